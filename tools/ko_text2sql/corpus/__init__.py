"""The pretraining corpus of the embedded model: an endless, seeded stream of synthetic documents.

Schemas, question and query pairs, rows, lessons about SQL and everyday prose, Korean and English,
all made from word pools and templates written for this project. The evaluation prompt does not
occur in it.
"""

from tools.ko_text2sql.corpus.schemas import random_domain
from tools.ko_text2sql.corpus.stream import HELD_OUT, documents, kinds_and_documents, training_domains

__all__ = ["HELD_OUT", "documents", "kinds_and_documents", "random_domain", "training_domains"]
