"""What the Minitron papers measured: figures and where they stand, to set ours beside.

P1 is "Compact Language Models via Pruning and Knowledge Distillation", its tables numbered as in
the NeurIPS version (where arXiv 2407.14679v2 numbers one otherwise, its source says so); P2 is "LLM
Pruning and Distillation in Practice: The Minitron Approach", arXiv 2408.11796. Figures only.
"""

from __future__ import annotations

from dataclasses import dataclass

PAPERS = {
    "P1": "Compact Language Models via Pruning and Knowledge Distillation, arXiv 2407.14679",
    "P2": "LLM Pruning and Distillation in Practice: The Minitron Approach, arXiv 2408.11796",
}


@dataclass(frozen=True)
class Evidence:
    """What was measured, and where it stands."""

    figures: str
    source: str


@dataclass(frozen=True)
class Practice:
    """A best practice, and what its authors rest it on."""

    number: int
    text: str
    source: str
    evidence: tuple[Evidence, ...]


@dataclass(frozen=True)
class PublishedTable:
    """A table's figures. A row is what it says it is, under `heads`, and its figures, under
    `measures` (printed with `digits`); None where the table has a gap."""

    name: str
    title: str
    source: str
    practices: tuple[int, ...]
    heads: tuple[str, ...]
    measures: tuple[str, ...]
    digits: tuple[int, ...]
    rows: tuple[tuple[tuple[str, ...], tuple[float | None, ...]], ...]


# --- the best practices ----------------------------------------------------------------------

_LIST = "P1 section 4.1"

PRACTICES = (
    Practice(
        1,
        "Train the largest model of a family, then prune and distil step by step to the smaller",
        _LIST,
        (
            Evidence(
                "MMLU 63.8 for Minitron 8B after 94B tokens, 54.7 for Nemotron-3 8B trained from "
                "scratch on 3.8T",
                "P1 table 2",
            ),
            Evidence(
                "HellaSwag and MMLU of a 4B model: 52.04 and 42.45 by way of the 8B, 51.04 and "
                "37.81 from the 15B at once, 48.23 and 26.24 from random weights with four times "
                "the tokens",
                "P1 table 14",
            ),
            Evidence("a family of 15B, 8B and 4B costs 1.8 times less to train", _LIST),
        ),
    ),
    Practice(
        2,
        "Width by activations aggregated as (batch L2, sequence mean); depth by perplexity or "
        "Block Influence",
        _LIST,
        (
            Evidence(
                "LM loss before retraining: 7.18 for (L2, mean), 7.21 for (mean, mean), 7.94 to "
                "10.55 for the seven others",
                "P1 table 11",
            ),
            Evidence(
                "LM loss of depth-pruned models: 2.155 by perplexity, 2.177 by Block Influence",
                "P1 table 13",
            ),
        ),
    ),
    Practice(
        3,
        "Score importance once: doing it in rounds brings nothing",
        _LIST,
        (
            Evidence(
                "LM validation loss of 1, 2 and 4 rounds: 5.43, 5.55 and 5.24 before retraining, "
                "1.92 for each after it",
                "P1 table 12",
            ),
        ),
    ),
    Practice(
        4,
        "Prefer cutting width to cutting depth (up to 15B parameters)",
        _LIST,
        (
            Evidence(
                "LM validation loss: 2.049 for width, 2.062 for depth and width, 2.155 and 2.177 "
                "for depth",
                "P1 tables 1 and 13",
            ),
            Evidence(
                "Llama-3.1-Minitron 4B, width against depth: MMLU 60.5 and 58.7, GSM8K 41.2 and "
                "16.8",
                "P2 table 1",
            ),
        ),
    ),
    Practice(
        5,
        "Retrain by distillation alone, with forward KL, not conventionally",
        _LIST,
        (
            Evidence(
                "MMLU of a pruned 4B model: 37.81 distilled with 100B tokens, 24.57 trained "
                "conventionally with 150B",
                "P1 table 14",
            ),
            Evidence(
                "LM loss: 2.107 for forward KL alone; beside cross-entropy 2.117 for forward KL, "
                "2.134 for cosine, 2.140 for reverse KL, 2.144 for MSE",
                "P1 table 15",
            ),
            Evidence("LM loss: 2.155 for forward KL, 2.665 for reverse KL", "P1 table 16"),
            Evidence("of the temperatures 0.1, 0.5, 1 and 3, 1 is best", "P1 appendix A.3"),
        ),
    ),
    Practice(
        6,
        "Where much depth is cut, distil logits, hidden states and embeddings",
        _LIST,
        (
            Evidence(
                "LM loss: 2.155 for logits alone, 2.145 with a block's output (29:13), 2.141 with "
                "the embedding as well; 2.180 and 2.240 where other blocks (31:15, 15:15) are "
                "matched",
                "P1 table 17",
            ),
        ),
    ),
    Practice(
        7,
        "Where little depth is cut, distil logits alone",
        _LIST,
        (
            Evidence(
                "MMLU, HellaSwag and HumanEval: 58.3, 73.8 and 26.2 for logits alone, 58.0, 73.6 "
                "and 26.8 with hidden states",
                "P1 table 18",
            ),
        ),
    ),
    Practice(
        8,
        "Prune the model that is closest to the target size",
        _LIST,
        (
            Evidence(
                "HellaSwag and MMLU of a 4B model: 52.04 and 42.45 pruned from the 8B, 51.04 and "
                "37.81 from the 15B",
                "P1 table 14",
            ),
        ),
    ),
    Practice(
        9,
        "Retrain candidates briefly before ranking them",
        _LIST,
        (
            Evidence(
                "the ranking of 15 candidates changes up to about 300 steps and is stable after",
                "P1 section 4.3",
            ),
            Evidence(
                "width overtakes depth and width before 200 steps (KD loss before retraining 6.33 "
                "and 5.35)",
                "P1 section 4.2 and table 1",
            ),
        ),
    ),
    Practice(
        10,
        "Of a model trained in several phases, prune and retrain the one of the last phase",
        _LIST,
        (
            Evidence(
                "MMLU and HumanEval: 61.9 and 30.5 from the last phase with 94B tokens, 54.7 and "
                "25.6 from the first with 113B; HellaSwag 80.1 and 80.3",
                "P1 table 20",
            ),
        ),
    ),
    Practice(
        11,
        "Where the teacher's own training data is not at hand, correct the teacher on the "
        "distillation corpus first",
        "P2",
        (
            Evidence(
                "a correction on about 100B tokens lowers the student's LM validation loss by more "
                "than 6%",
                "P2 section 4",
            ),
        ),
    ),
    Practice(
        12,
        "Choose the layers to drop by a downstream task, and contiguous, not by LM loss",
        "P2",
        (
            Evidence(
                "WinoGrande with 16 layers left out: 0.595 for the contiguous 16 to 31, 0.5 "
                "(chance) for single layers chosen by LM loss",
                "P2 section 4",
            ),
        ),
    ),
)
"""The ten of P1 section 4.1, and the two that P2 adds."""


# --- tables ----------------------------------------------------------------------------------

P1_T1 = PublishedTable(
    "p1_t1",
    "What is cut, before and after a light retraining (15B to 8B, 1.8B tokens)",
    "P1 table 1",
    (4,),
    ("axes cut",),
    ("KD loss before", "KD loss after", "LM loss"),
    (2, 2, 3),
    (
        (("DEP + MLP + ATT + EMB",), (5.35, 0.38, 2.062)),
        (("MLP + ATT + EMB",), (6.33, 0.37, 2.049)),
        (("MLP + ATT",), (5.07, 0.42, 2.101)),
        (("DEP",), (8.35, 0.49, 2.155)),
        (("random weights",), (12.27, 2.34, 3.953)),
    ),
)

P1_T11 = PublishedTable(
    "p1_t11",
    "How activations are aggregated over batch and sequence, before retraining (15B to 8B)",
    "P1 table 11 (13 in arXiv v2)",
    (2,),
    ("batch", "sequence"),
    ("LM loss", "LM loss on WikiText-2"),
    (2, 2),
    (
        (("L2", "L2"), (8.73, 8.37)),
        (("L2", "mean"), (7.18, 7.23)),
        (("L2", "variance"), (8.18, 8.61)),
        (("mean", "L2"), (8.41, 7.84)),
        (("mean", "mean"), (7.21, 6.89)),
        (("mean", "variance"), (7.94, 8.29)),
        (("variance", "L2"), (9.01, 9.30)),
        (("variance", "mean"), (8.34, 8.72)),
        (("variance", "variance"), (10.55, 11.14)),
    ),
)

P1_T12 = PublishedTable(
    "p1_t12",
    "Rounds of scoring and cutting (the embedding axis of the 15B alone)",
    "P1 table 12 (14 in arXiv v2)",
    (3,),
    ("rounds",),
    ("LM loss before", "LM loss after"),
    (2, 2),
    (
        (("T = 1",), (5.43, 1.92)),
        (("T = 2",), (5.55, 1.92)),
        (("T = 4",), (5.24, 1.92)),
    ),
)

P1_T13 = PublishedTable(
    "p1_t13",
    "Depth, width and both, after a light retraining (15B to 8B, 1.8B tokens)",
    "P1 table 13 (10 in arXiv v2)",
    (2, 4, 9),
    ("what is cut",),
    ("parameters [B]", "LM loss"),
    (2, 3),
    (
        (("depth, by perplexity",), (9.39, 2.155)),
        (("depth, by Block Influence",), (9.39, 2.177)),
        (("width",), (7.74, 2.049)),
        (("depth and width",), (7.91, 2.062)),
    ),
)

P1_T14 = PublishedTable(
    "p1_t14",
    "Ways to a small model (4B)",
    "P1 table 14 (11 in arXiv v2)",
    (1, 5, 8),
    ("model", "tokens in the paper"),
    ("HellaSwag", "MMLU"),
    (2, 2),
    (
        (("random weights, trained conventionally", "150B"), (46.22, 24.36)),
        (("random weights, trained conventionally", "400B"), (48.23, 26.24)),
        (("pruned, trained conventionally", "150B"), (50.85, 24.57)),
        (("pruned, distilled", "100B"), (51.04, 37.81)),
        (("pruned from the closer source, distilled", "100B"), (52.04, 42.45)),
    ),
)

P1_T15 = PublishedTable(
    "p1_t15",
    "Losses (Nemotron-3 8B)",
    "P1 table 15",
    (5,),
    ("loss",),
    ("LM loss", "WikiText perplexity"),
    (3, 3),
    (
        (("cross-entropy + MSE",), (2.144, 9.007)),
        (("cross-entropy + reverse KL",), (2.140, 9.008)),
        (("cross-entropy + cosine",), (2.134, 8.965)),
        (("cross-entropy + forward KL",), (2.117, 8.791)),
        (("forward KL",), (2.107, 8.720)),
    ),
)

P1_T16 = PublishedTable(
    "p1_t16",
    "Forward and reverse KL (8B, depth cut)",
    "P1 table 16",
    (5,),
    ("loss",),
    ("LM loss",),
    (3,),
    (
        (("reverse KL",), (2.665,)),
        (("forward KL",), (2.155,)),
    ),
)

P1_T17 = PublishedTable(
    "p1_t17",
    "Hidden states beside the logits, and which blocks are matched (8B, half of the depth cut)",
    "P1 table 17",
    (6,),
    ("loss", "teacher's block : student's"),
    ("LM loss",),
    (3,),
    (
        (("logits", ""), (2.155,)),
        (("logits + output", "29:13"), (2.145,)),
        (("logits + output + embedding", "15:15"), (2.240,)),
        (("logits + output + embedding", "23:15"), (2.205,)),
        (("logits + output + embedding", "29:15"), (2.203,)),
        (("logits + output + embedding", "30:15"), (2.188,)),
        (("logits + output + embedding", "31:15"), (2.180,)),
        (("logits + output + embedding", "28:12"), (2.141,)),
        (("logits + output + embedding", "29:13"), (2.141,)),
        (("logits + output + embedding", "29:14"), (2.152,)),
        (("logits + output + embedding", "30:14"), (2.150,)),
        (("logits + output + embedding + input", "29:13"), (2.141,)),
    ),
)

P1_T18 = PublishedTable(
    "p1_t18",
    "Hidden states where depth is kept (8B, width cut)",
    "P1 table 18",
    (7,),
    ("loss", "tokens in the paper"),
    ("MMLU", "HellaSwag", "HumanEval"),
    (1, 1, 1),
    (
        (("logits + hidden states", "18.9B"), (58.0, 73.6, 26.8)),
        (("logits", "18.9B"), (58.3, 73.8, 26.2)),
        (("logits", "94B"), (62.8, 79.7, 30.4)),
    ),
)

P1_T20 = PublishedTable(
    "p1_t20",
    "Pruning the model of the first or of the last phase of training (8B)",
    "P1 table 20",
    (10,),
    ("pruned model; retrained on the data of", "tokens in the paper"),
    ("MMLU", "HellaSwag", "PIQA", "HumanEval"),
    (1, 1, 1, 1),
    (
        (("first phase; both phases", "113B"), (54.7, 80.3, 77.2, 25.6)),
        (("last phase; last phase", "94B"), (61.9, 80.1, 76.7, 30.5)),
    ),
)

P2_T1 = PublishedTable(
    "p2_t1",
    "Accuracy of teacher and students",
    "P2 table 1",
    (4, 12),
    ("model",),
    ("winogrande", "arc_challenge", "mmlu", "hellaswag", "gsm8k", "truthfulqa_mc2"),
    (1, 1, 1, 1, 1, 1),
    (
        (("Llama-3.1-8B",), (77.3, 57.9, 65.3, 81.8, 48.6, 45.0)),
        (("Llama-3.1-Minitron-4B-Width",), (73.5, 55.6, 60.5, 76.1, 41.2, 42.9)),
        (("Llama-3.1-Minitron-4B-Depth",), (72.1, 52.6, 58.7, 73.2, 16.8, 38.2)),
        (("Minitron-4B",), (74.0, 50.9, 58.6, 75.0, 24.1, 42.9)),
    ),
)
"""Measures are tasks of lm-evaluation-harness, in percent."""
