"""The command line: the verbs and their options, nothing else.

Each verb imports what it runs when it runs, so `--help` and every usage error answer at once. Typer's rich help
is off (`rich_markup_mode=None`): importing it would double the time of `--help`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="quantlab",
    help="Make language models small, and prove what that cost.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[
    bool,
    typer.Option("--json", help="Print one machine-readable summary on stdout, everything else on stderr."),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        "--memory-limit",
        metavar="SIZE",
        help="Keep memory near SIZE above an idle process (600M, 8G): hidden states are spilled to disk.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Results = Annotated[Path, typer.Option("--results", help="Where runs and the leaderboard are kept.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe (repeatable)."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Resume an interrupted run, skipping completed steps.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Validate everything, show what would be done, and exit.")
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]


def _version(wanted: bool) -> None:
    if wanted:
        from quantlab import __version__

        typer.echo(f"quantlab {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Where everything is written.")] = Path("results/demo"),
    device: Device = "cpu",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run everything on the embedded model: base, distilled student, eight quantized students. Offline, minutes."""
    from quantlab.commands.guard import guarded

    with guarded(debug=debug, as_json=as_json, interrupted="run it again: it goes on where it stopped"):
        from quantlab.demo import run

        run(out, device=device, as_json=as_json)


@app.command()
def quantize(
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE...", help="Recipe files, or bundled names.")
    ],
    model: Annotated[
        str, typer.Option("--model", help="Hugging Face id, directory, GGUF file, or embedded:base.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="The checkpoint's directory; with several recipes each goes to OUT/<recipe>."
        ),
    ] = None,
    results: Results = Path("results"),
    overrides: Sets = None,
    device: Device = "auto",
    no_eval: Annotated[
        bool, typer.Option("--no-eval", help="Write the checkpoint only; skip evaluation.")
    ] = False,
    memory_limit: MemoryLimit = None,
    save_statistics: Annotated[
        Path | None,
        typer.Option("--save-statistics", metavar="DIR", help="Save the Hessians of the calibration pass."),
    ] = None,
    save_imatrix: Annotated[
        Path | None,
        typer.Option(
            "--save-imatrix",
            metavar="FILE",
            help="Save llama.cpp's importance matrix of the calibration pass.",
        ),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            "--statistics", metavar="DIR", help="Solve from saved Hessians, without a forward pass."
        ),
    ] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not verify the checkpoint in a fresh process.")
    ] = False,
    resume: Resume = False,
    dry_run: DryRun = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize a model with one or more recipes, measure the saved checkpoints, and rank them."""
    from quantlab.commands.guard import RESUME, guarded

    with guarded(debug=debug, as_json=as_json, interrupted=RESUME):
        from quantlab.commands.quantize import Options, run
        from quantlab.commands.sizes import size_of

        run(
            recipes,
            Options(
                memory_limit=size_of(memory_limit, "--memory-limit"),
                save_statistics=save_statistics,
                save_imatrix=save_imatrix,
                statistics=statistics,
                verify=not no_verify,
                model=model,
                out=out,
                results=results,
                overrides=tuple(overrides or ()),
                device=device,
                evaluate=not no_eval,
                resume=resume,
                dry_run=dry_run,
                trust_remote_code=trust_remote_code,
            ),
            as_json=as_json,
        )


@app.command()
def plan(
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE...", help="Recipe files, or bundled names.")
    ],
    model: Annotated[
        str, typer.Option("--model", help="Hugging Face id, directory, GGUF file, or embedded:base.")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Where the checkpoints would go.")] = None,
    memory_limit: MemoryLimit = None,
    overrides: Sets = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Estimate size, disk, memory and time before quantizing."""
    from quantlab.commands.guard import guarded

    with guarded(debug=debug, as_json=as_json):
        from quantlab.commands.plan import Options, run
        from quantlab.commands.sizes import size_of

        limit = size_of(memory_limit, "--memory-limit")
        options = Options(model, out, tuple(overrides or ()), device, limit, trust_remote_code)
        run(recipes, options, as_json=as_json)


@app.command()
def convert(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="A quantized checkpoint: directory, Hugging Face id, or GGUF file."
        ),
    ],
    to: Annotated[
        str, typer.Option("--to", metavar="FORMAT", help="gguf, gptq, awq, or compressed-tensors.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The new checkpoint's directory; default checkpoints/<name>/<format>."),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance",
            metavar="REL",
            help="Let a scale or minimum be off by this share of itself, where it is not stored exactly.",
        ),
    ] = 0.0,
    widen: Annotated[
        bool,
        typer.Option("--widen", help="Store codes in more bits, where the format does not hold theirs."),
    ] = False,
    device: Device = "cpu",
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not load both checkpoints in a fresh process.")
    ] = False,
    dry_run: DryRun = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert a quantized checkpoint to another format without quantizing it again, or say why that cannot be."""
    from quantlab.commands.guard import guarded

    with guarded(debug=debug, as_json=as_json):
        from quantlab.commands.convert import Options, run

        options = Options(
            to=to,
            out=out,
            tolerance=tolerance,
            widen=widen,
            device=device,
            verify=not no_verify,
            dry_run=dry_run,
            trust_remote_code=trust_remote_code,
        )
        run(checkpoint, options, as_json=as_json)


@app.command()
def calibration(
    what: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE|RECIPE", help="A text (file, bundled name, hf:…), or a quantize recipe."
        ),
    ],
    model: Annotated[str, typer.Option("--model", help="Hugging Face id, directory, or embedded:base.")],
    overrides: Sets = None,
    show: Annotated[int, typer.Option("--show", min=0, help="Rows to print the beginning of.")] = 3,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the rows that a model would be calibrated on: sources, scripts, special tokens, what is left out."""
    from quantlab.commands.guard import guarded

    with guarded(debug=debug, as_json=as_json):
        from quantlab.commands.calibration import run

        run(
            what,
            model,
            tuple(overrides or ()),
            show=show,
            trust_remote_code=trust_remote_code,
            as_json=as_json,
        )


@app.command()
def layers(
    what: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT|RECIPE", help="A checkpoint of quantlab's, or a recipe to try on --model."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="What a recipe is tried on; of a checkpoint the original, to measure what it lacks.",
        ),
    ] = None,
    budget: Annotated[
        str,
        typer.Option("--budget", metavar="PERCENT", help="How much larger the quantized layers may become."),
    ] = "5%",
    average_bits: Annotated[
        float | None,
        typer.Option(
            "--average-bits", metavar="BITS", help="In place of --budget: bits a code on average, as 3.25."
        ),
    ] = None,
    bits: Annotated[int, typer.Option("--bits", help="What the overrides give a layer: 4 or 8.")] = 8,
    top: Annotated[int, typer.Option("--top", min=0, help="Layers to print, 0 for all.")] = 20,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Write a heat map of layers and blocks, an SVG."),
    ] = None,
    overrides: Sets = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show which layers hurt, and the overrides that a budget is best spent on."""
    from quantlab.commands.guard import guarded

    with guarded(debug=debug, as_json=as_json):
        from quantlab.commands.layers import Options, run

        options = Options(
            model, budget, average_bits, bits, top, plot, tuple(overrides or ()), device, trust_remote_code
        )
        run(what, options, as_json=as_json)


@app.command()
def distill(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or a bundled name.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The student's directory; the cells of a sweep go to OUT/<cell>."),
    ] = None,
    results: Results = Path("results"),
    ledger: Annotated[
        Path | None,
        typer.Option("--ledger", help="File that records every paid answer; default RESULTS/ledger.sqlite."),
    ] = None,
    overrides: Sets = None,
    device: Device = "auto",
    resume: Resume = False,
    dry_run: DryRun = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a small student on a teacher's cleaned answers and compare it with its base."""
    from quantlab.commands.guard import RESUME, guarded

    with guarded(debug=debug, as_json=as_json, interrupted=RESUME):
        from quantlab.commands.distill import run
        from quantlab.commands.distill_plan import Options

        run(
            recipe,
            Options(
                out=out,
                results=results,
                ledger=ledger,
                overrides=tuple(overrides or ()),
                device=device,
                resume=resume,
                dry_run=dry_run,
                trust_remote_code=trust_remote_code,
            ),
            as_json=as_json,
        )


@app.command()
def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Hugging Face id, directory, GGUF file, or embedded:base."),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="TASK", help="perplexity, text2sql, fidelity, speed, lm-eval:<name>."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            help="Model to compare with: KL divergence, perplexity ratio, lost and gained questions.",
        ),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            "--predictions", help="Score SQL from JSON lines of id and prediction, without a model."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Questions: a file, or spider:DIR:dev, bird:DIR, hf:owner/name:split, …"),
    ] = None,
    rules: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="RULE",
            help="Also score with an official evaluator: spider-test-suite, bird, sql-eval.",
        ),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            "--runtime", help="What computes the model: transformers, or llama.cpp for a GGUF file."
        ),
    ] = None,
    judge: Annotated[
        Path | None,
        typer.Option(
            "--judge",
            help="With --predictions: JSON lines of id and answer (yes or no) to compare with execution.",
        ),
    ] = None,
    results: Results = Path("results"),
    overrides: Sets = None,
    device: Device = "auto",
    resume: Resume = False,
    dry_run: DryRun = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a model or checkpoint as stored, or score SQL that was written elsewhere."""
    from quantlab.commands.guard import RESUME, guarded

    with guarded(debug=debug, as_json=as_json, interrupted=RESUME):
        from quantlab.commands.evaluate import Options, run_either

        run_either(
            model,
            predictions,
            judge,
            Options(
                tasks=tuple(tasks or ()),
                baseline=baseline,
                data=data,
                rules=tuple(rules or ()),
                runtime=runtime,
                results=results,
                overrides=tuple(overrides or ()),
                device=device,
                resume=resume,
                dry_run=dry_run,
                trust_remote_code=trust_remote_code,
            ),
            as_json=as_json,
        )


@app.command()
def leaderboard(
    results: Results = Path("results"),
    sort: Annotated[str | None, typer.Option("--sort", metavar="COL", help="Column to rank by.")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Also write the table to this CSV file.")] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a self-contained page with plots.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Rebuild the leaderboard from every finished run and show it."""
    from quantlab.commands.guard import guarded

    with guarded(debug=debug, as_json=as_json):
        from quantlab.commands.leaderboard import run

        run(results, sort=sort, csv=csv, html=html, as_json=as_json)


@app.command()
def recipes(
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema, for editors.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the bundled recipes."""
    from quantlab.commands.guard import guarded

    with guarded(debug=debug, as_json=as_json):
        from quantlab.commands.recipes import run

        run(schema=schema, as_json=as_json)


@app.command()
def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="A model as for quantize: what of it can be quantized, in which format, and who reads that.",
        ),
    ] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what this machine can run, and why not; with --model, what can be done with a model."""
    from quantlab.commands.guard import guarded

    with guarded(debug=debug, as_json=as_json):
        if model is not None:
            from quantlab.commands.doctor_model import run as run_model

            run_model(model, trust_remote_code=trust_remote_code, as_json=as_json)
            return
        from quantlab.commands.doctor import run

        run(as_json=as_json)


def main() -> None:
    app()
