"""The teacher's log-probabilities on disk: what is gathered, kept, found again, refused."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantlab.distill.logit_store import INDEX, Writer
from quantlab.distill.logits import (
    Example,
    TopLogits,
    example_digest,
    gather_logits,
    same_vocabulary,
    top_logprobs,
    vocabulary_digest,
)
from quantlab.distill.losses import divergence, student_buckets, teacher_buckets
from quantlab.errors import DataError
from quantlab.models.load import load_model
from quantlab.progress import Silent

from ..conftest import byte_tokenizer

IDENTITY = {"teacher": "abc", "tokens": "def"}
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return load_model(tiny, device="cpu", dtype="float32").model


def examples(count: int = 12, seed: int = 0) -> list[Example]:
    seeded = random.Random(seed)
    found = []
    for _ in range(count):
        length = seeded.randint(3, 40)
        ids = [seeded.randrange(257) for _ in range(length)]
        found.append(Example(ids, sorted(seeded.sample(range(length), seeded.randint(1, length)))))
    return found


def gather(
    model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]], path: Path, **changes: Any
) -> TopLogits:
    options: dict[str, Any] = {
        "top_k": 8,
        "temperature": 1.0,
        "batch_tokens": 128,
        "device": "cpu",
        "identity": IDENTITY,
        "progress": Silent(),
    }
    return gather_logits(model, rows, path, **{**options, **changes})


def alone(model: Any, example: Example, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of one example run by itself: [positions, V]."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0]
    return torch.log_softmax(logits[list(example.positions)].double() / temperature, dim=-1)


class Counting:
    """The model, counting what it is asked."""

    def __init__(self, model: Any) -> None:
        self.model, self.rows = model, 0
        self.config, self.training, self.forward = model.config, False, model.forward

    def __call__(self, **inputs: Any) -> Any:
        self.rows += len(inputs["input_ids"])
        return self.model(**inputs)

    def eval(self) -> Any:
        return self.model.eval()

    def train(self, mode: bool) -> Any:
        return self.model.train(mode)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_batches_equal_each_example_alone(model: Any, tmp_path: Path, temperature: float) -> None:
    rows = examples()
    store = gather(model, rows, tmp_path / "s", temperature=temperature)
    assert len(store) == len(rows) and store.temperature == temperature and store.vocabulary == 257
    for row in rows:
        expected = alone(model, row, temperature)
        values, indices = store.lookup(store.number(*row))
        assert values.shape == (len(row.positions), 9) and values.dtype == torch.float32
        assert indices.shape == (len(row.positions), 8) and indices.dtype == torch.int64
        best, _ = expected.topk(8, dim=1)
        # float16 rounds to half a unit in the last place; batches differ from single rows by 1e-6
        bound = best.abs() / 2048 + 1e-5
        assert bool(((values[:, :8] - best).abs() <= bound).all())
        assert bool(((expected.gather(1, indices) - best).abs() < 1e-5).all())
        rest = torch.log1p(-best.exp().sum(dim=1))
        assert bool(((values[:, 8] - rest).abs() <= rest.abs() / 2048 + 1e-5).all())


def test_order_subsets_and_repetitions_do_not_matter(model: Any, tmp_path: Path) -> None:
    rows = examples()
    first = gather(model, rows, tmp_path / "s")
    counting = Counting(model)
    shuffled = [*reversed(rows), rows[3]]
    again = gather(counting, shuffled, tmp_path / "s", batch_tokens=64)
    subset = gather(counting, rows[:4], tmp_path / "s")
    assert counting.rows == 0 and len(again) == len(subset) == len(rows)
    for row in shuffled:
        assert torch.equal(first.lookup(first.number(*row))[0], again.lookup(again.number(*row))[0])


def test_new_examples_are_added(model: Any, tmp_path: Path) -> None:
    rows = examples()
    gather(model, rows[:8], tmp_path / "s")
    counting = Counting(model)
    store = gather(counting, rows, tmp_path / "s")
    assert counting.rows == 4 and len(store) == 12
    opened = TopLogits.open(tmp_path / "s", IDENTITY)
    assert all(example_digest(*row) in opened for row in rows)
    # The same tokens with other positions are another example.
    with pytest.raises(DataError, match="no log-probabilities of an example of"):
        opened.number(rows[0].input_ids, [0] if list(rows[0].positions) != [0] else [1])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"identity": {"teacher": "xyz", "tokens": "def"}}, "teacher is abc, not xyz"),
        ({"identity": {"teacher": "abc"}}, "tokens is def, not unknown"),
        ({"top_k": 4}, "top_k is 8, not 4"),
        ({"temperature": 2.0}, "temperature is 1.0, not 2.0"),
        ({"vocabulary": 250}, "vocabulary is 257, not 250"),
    ],
)
def test_a_store_of_something_else_is_refused(
    model: Any, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    rows = examples(2)
    gather(model, rows, tmp_path / "s")
    with pytest.raises(DataError, match=told) as caught:
        gather(model, rows, tmp_path / "s", **change)
    assert "delete" in caught.value.hint
    if "identity" in change and "tokens" in change["identity"]:
        with pytest.raises(DataError, match=told):
            TopLogits.open(tmp_path / "s", change["identity"])


@pytest.mark.parametrize("vocabulary", [None, 200])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_all_tokens_kept_give_the_divergence_of_the_models(
    model: Any, tmp_path: Path, kind: Any, vocabulary: int | None
) -> None:
    """With K = V only float16 stands between the store and the truth: a 2048th of the cross-entropy, some 6 nats."""
    row = examples(1)[0]
    store = gather(model, [row], tmp_path / "s", top_k=1000, vocabulary=vocabulary)
    size = vocabulary or 257
    assert store.top_k == size
    values, indices = store.lookup(0)
    student = torch.randn(len(row.positions), size, generator=torch.Generator().manual_seed(0))
    found = divergence(student, values, indices, kind=kind).double()
    p = alone(model, row)[:, :size].log_softmax(1)
    q = student.double().log_softmax(1)
    m = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
    truth = {
        "forward_kl": (p.exp() * (p - q)).sum(1),
        "reverse_kl": (q.exp() * (q - p)).sum(1),
        "jsd": (p.exp() * (p - m) + q.exp() * (q - m)).sum(1) / 2,
    }[kind]
    assert bool(((found - truth).abs() < 4e-3).all()) and bool(((found - truth).abs() > 0).any())


def test_what_float16_costs_is_what_the_page_of_the_store_says() -> None:
    """Flat and peaked teachers against like and unlike students."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-1, 1, 200, dtype=torch.float64)[:, None]
    teacher = torch.randn(200, 4096, generator=generator, dtype=torch.float64) * scales
    noise = torch.randn(200, 4096, generator=generator, dtype=torch.float64)
    student = teacher + noise * torch.tensor([0.1, 1.0]).repeat(100)[:, None]
    values, indices = top_logprobs(teacher, 64)
    values = values.double()
    rounded = values.to(torch.float16).double()
    wrong = values.abs() / 2048 + 3e-8
    p = teacher_buckets(values, indices, 4096)
    q = student_buckets(student, indices)
    ratio = p - q
    kl = (p.exp() * ratio).sum(dim=1, keepdim=True)
    bounds = {
        "forward_kl": (p.exp() * wrong * (ratio - kl).abs()).sum(dim=1),
        "reverse_kl": ((p.exp() - q.exp()).abs() * wrong).sum(dim=1),
    }
    for kind, bound in bounds.items():
        exact = divergence(student, values, indices, kind=kind)  # type: ignore[arg-type]
        found = divergence(student, rounded, indices, kind=kind)  # type: ignore[arg-type]
        assert bool(((found - exact).abs() <= 1.02 * bound + 1e-7).all())
        assert (found - exact).abs().max() < 5e-3 and (found - exact).abs().mean() < 5e-4


@pytest.mark.parametrize(("vocabulary", "dtype"), [(65536, torch.uint16), (65537, torch.int32)])
def test_indices_as_small_as_the_vocabulary_allows(
    tmp_path: Path, vocabulary: int, dtype: torch.dtype
) -> None:
    from safetensors import safe_open

    identity = {"top_k": "2", "temperature": "1.0", "vocabulary": str(vocabulary)}
    index: dict[str, Any] = {"format": "quantlab-top-logits-1", "identity": identity, "shards": []}
    writer = Writer(tmp_path, index, vocabulary)
    tokens = torch.tensor([[vocabulary - 1, 0], [3, 65535]])
    writer.add([(bytes(32), 2)], torch.tensor([[-1e9, -1.0, -torch.inf]] * 2), tokens)
    writer.flush()
    file = next(tmp_path.glob("*.safetensors"))
    with safe_open(file, framework="pt") as stream:
        assert stream.get_tensor("indices").dtype == dtype
    values, indices = TopLogits.open(tmp_path).lookup(0)
    assert torch.equal(indices, tokens) and bool(values.isfinite().all())
    assert not list(tmp_path.glob("*.pkl")) and not list(tmp_path.glob("*.pt"))


SLOW = """
import sys, time, torch
from pathlib import Path
sys.path.insert(0, {repository!r})
from tests.distill.test_logits import examples, gather
from quantlab.models.load import load_model

torch.set_num_threads(1)
model = load_model({tiny!r}, device="cpu", dtype="float32").model
forward = model.forward
def slow(input_ids=None, attention_mask=None, use_cache=None, logits_to_keep=0):
    time.sleep(0.1)
    return forward(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep)
model.forward = slow
gather(model, examples(60), Path({store!r}), batch_tokens=1, shard_positions=40)
"""


def test_a_kill_in_the_middle_loses_at_most_a_shard(model: Any, tiny: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    script = SLOW.format(repository=str(REPOSITORY), tiny=str(tiny), store=str(store))
    process = subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 300
        while len(list(store.glob("shard-*.safetensors"))) < 3:
            assert process.poll() is None and time.monotonic() < deadline, process.stderr
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    kept = len(TopLogits.open(store))
    assert 0 < kept < 60
    (store / "shard-0.part").write_bytes(b"half")  # a kill while a shard is written
    (store / "shard-1.safetensors").write_bytes(b"whole, but not in the index")
    counting = Counting(model)
    rows = examples(60)
    found = gather(counting, rows, store, batch_tokens=1, shard_positions=40)
    assert counting.rows == 60 - kept and len(found) == 60
    whole = gather(model, rows, tmp_path / "undisturbed", batch_tokens=1, shard_positions=40)
    for row in rows:
        left, right = found.lookup(found.number(*row)), whole.lookup(whole.number(*row))
        assert torch.equal(left[1], right[1]) and torch.equal(left[0], right[0])
    assert {p.suffix for p in store.iterdir() if not p.name.startswith(".")} == {".json", ".safetensors"}


def test_a_missing_shard_is_gathered_again(model: Any, tmp_path: Path) -> None:
    rows = examples()
    gather(model, rows, tmp_path / "s", shard_positions=40)
    shards = sorted((tmp_path / "s").glob("*.safetensors"))
    assert len(shards) >= 2
    shards[0].unlink()
    with pytest.raises(DataError, match="is missing"):
        TopLogits.open(tmp_path / "s")
    counting = Counting(model)
    assert len(gather(counting, rows, tmp_path / "s")) == len(rows) and 0 < counting.rows < len(rows)


def test_damage_is_named(model: Any, tmp_path: Path) -> None:
    store = tmp_path / "s"
    with pytest.raises(DataError, match="holds no log-probabilities"):
        TopLogits.open(store)
    gather(model, examples(3), store)
    shard = next(store.glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(DataError, match=r"shard-\w+\.safetensors is damaged"):
        gather(model, examples(3), store)
    shard.write_bytes(whole)
    index = json.loads((store / INDEX).read_text(encoding="utf-8"))
    for broken in (
        "{",
        "[]",
        json.dumps({**index, "format": "other"}),
        json.dumps({**index, "identity": {}}),
    ):
        (store / INDEX).write_text(broken, encoding="utf-8")
        with pytest.raises(DataError, match=r"index\.json is damaged"):
            TopLogits.open(store)
    outside = {**index, "shards": [{"file": "../elsewhere.safetensors"}]}
    (store / INDEX).write_text(json.dumps(outside), encoding="utf-8")
    with pytest.raises(DataError, match=r"index\.json is damaged"):
        TopLogits.open(store)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (([], []), "no tokens"),
        (([1, 257], [0]), "outside the teacher's 257"),
        (([1, 2], [2]), "positions outside its 2 tokens"),
        (([1, 2], [-1]), "positions outside"),
    ],
)
def test_examples_that_do_not_fit(
    model: Any, tmp_path: Path, row: tuple[list[int], list[int]], told: str
) -> None:
    with pytest.raises(DataError, match=f"example 1: .*{told}"):
        gather(model, [Example([1], [0]), row], tmp_path / "s")


def test_an_example_without_positions_has_no_rows(model: Any, tmp_path: Path) -> None:
    store = gather(model, [([1, 2], []), ([3, 4, 5], [1])], tmp_path / "s", batch_tokens=3)
    values, indices = store.lookup(store.number([1, 2], []))
    assert values.shape == (0, 9) and indices.shape == (0, 8)


def test_a_teacher_of_nan_is_refused(tiny: Path, tmp_path: Path) -> None:
    broken = load_model(tiny, device="cpu", dtype="float32").model.train()
    broken.lm_head.weight.data[5] = torch.nan
    with pytest.raises(DataError, match="not numbers"):
        gather(broken, examples(2), tmp_path / "s")
    assert broken.training  # as it was


def config(vocabulary: int) -> Any:
    found = SimpleNamespace(vocab_size=vocabulary)
    found.get_text_config = lambda: found
    return found


def test_same_vocabularies_are_cut_to_what_both_have() -> None:
    teacher, student = byte_tokenizer(), byte_tokenizer()
    assert same_vocabulary(teacher, student, config(257), config(257)) == 257
    assert same_vocabulary(teacher, student, config(320), config(264)) == 257  # padded embeddings
    student.add_special_tokens({"pad_token": "<pad>"})
    assert same_vocabulary(teacher, student, config(257), config(258)) == 257
    assert same_vocabulary(student, teacher, config(258), config(257)) == 257
    assert vocabulary_digest(teacher) == vocabulary_digest(byte_tokenizer()) != vocabulary_digest(student)


def test_different_vocabularies_are_explained() -> None:
    teacher, student = byte_tokenizer(), byte_tokenizer()
    student.add_tokens(["추가", "더"])
    with pytest.raises(DataError, match="2 ids differ.*id 257: nothing against '추가'; id 258") as caught:
        same_vocabulary(teacher, student, config(257), config(259))
    assert "loss: sft" in caught.value.hint
    swapped = json.loads(teacher.backend_tokenizer.to_str())
    tokens = swapped["model"]["vocab"]
    first, second = [t for t, n in tokens.items() if n in (40, 41)]
    tokens[first], tokens[second] = tokens[second], tokens[first]
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(swapped)), eos_token="</s>", pad_token="</s>"
    )
    with pytest.raises(DataError, match="2 ids differ.*id 40: '.' against '.'; id 41: '.' against '.'"):
        same_vocabulary(teacher, other, config(257), config(257))


def test_different_ends_are_explained() -> None:
    teacher, student = byte_tokenizer(), byte_tokenizer()
    student.eos_token = ";"
    with pytest.raises(DataError, match="ends its answers with '</s>' and the student with ';'") as caught:
        same_vocabulary(teacher, student, config(257), config(257))
    assert "eos_token" in caught.value.hint
