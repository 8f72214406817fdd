"""The paper's tables: what each row is in this trainer's configuration, and the numbers printed there.

A table's rows are ``(its name in the paper, our row, the paper's AudioSet 20K mAP, its VGGSound 20K accuracy)``. A row
is a training; tables that share one (their bases) train it once.
"""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("restore", "mse", "kl", "contrast")
VIEWS = ("intra", "inter")


def only(*terms: str) -> tuple[str, ...]:
    """Overrides that leave these terms of Formula 10 on, such as ``"restore_intra"``, and no other."""
    known = [f"{kind}_{view}" for kind in KINDS for view in VIEWS]
    assert set(terms) <= set(known), terms
    return tuple(f"loss.{term}={'true' if term in terms else 'false'}" for term in known)


def of_view(view: str, kinds: int = len(KINDS)) -> tuple[str, ...]:
    """The first ``kinds`` terms of one view, in the order in which Tables 2 and 5 add them."""
    return tuple(f"{kind}_{view}" for kind in KINDS[:kinds])


PLAIN = ("loss.hog_weight=false", "mask.inter_sampling=uniform")
"""Before the paper brings in HOG: reconstruction without weights, patches masked with equal probability."""
ONE = ("recipe.iterations=1",)
UNTAUGHT = ("distill.teacher=", "distill.stored=")
FROM_LABELS = (*ONE, *UNTAUGHT, 'recipe.stages=["distill"]')
SSL = (*ONE, *UNTAUGHT, 'recipe.stages=["ssl","distill"]')

ROWS: dict[str, tuple[str, ...]] = {
    "base": FROM_LABELS,
    "intra-ssr": (*SSL, *only("restore_intra"), *PLAIN),
    "intra-ssr-hog": (*SSL, *only("restore_intra")),
    "intra-mse": (*SSL, *only(*of_view("intra", 2))),
    "intra-kl": (*SSL, *only(*of_view("intra", 3))),
    "intra-ss": (*SSL, *only(*of_view("intra"))),
    **{
        f"inter-ssr-{ratio}": (*SSL, *only("restore_inter"), *PLAIN, f"mask.inter_ratio={ratio / 100}")
        for ratio in (45, 55, 65, 75, 85)
    },
    "inter-ssr-hog": (*SSL, *only("restore_inter")),
    "inter-mse": (*SSL, *only(*of_view("inter", 2))),
    "inter-kl": (*SSL, *only(*of_view("inter", 3))),
    "inter-ss": (*SSL, *only(*of_view("inter"))),
    "multi-ssl": (*SSL, *only(*of_view("intra"), *of_view("inter"))),
    # With the configuration's own teacher and iterations: Table 9's rows are stages of one training.
    "iterations": (),
}
"""Our rows by name, each the overrides that make it of the configuration."""


@dataclass(frozen=True)
class Entry:
    """A row of a table: its name in the paper, the training it is of, the stage of it, the two printed numbers."""

    label: str
    row: str
    audioset: float | None
    vggsound: float | None
    stage: str = "iter1-distill"


TABLES: dict[int, tuple[str, tuple[Entry, ...]]] = {
    1: (
        "Impact of intra-patch spectrogram reconstruction",
        (
            Entry("Base", "base", 0.371, 0.537),
            Entry("+Intra-SSR", "intra-ssr", 0.374, 0.542),
            Entry("+HOG Weight", "intra-ssr-hog", 0.377, 0.544),
        ),
    ),
    2: (
        "Impact of intra-patch feature reconstruction",
        (
            Entry("Base", "intra-ssr-hog", 0.377, 0.544),
            Entry("+intra-SSF & mse", "intra-mse", 0.383, 0.549),
            Entry("+intra-SSF & KL", "intra-kl", 0.383, 0.551),
            Entry("+intra-SSF & cont", "intra-ss", 0.391, 0.557),
        ),
    ),
    3: (
        "Impact of inter-patch mask ratios",
        (
            Entry("45%", "inter-ssr-45", 0.353, 0.526),
            Entry("55%", "inter-ssr-55", 0.361, 0.539),
            Entry("65%", "inter-ssr-65", 0.363, 0.541),
            Entry("75%", "inter-ssr-75", 0.365, 0.542),
            Entry("85%", "inter-ssr-85", 0.364, 0.542),
        ),
    ),
    4: (
        "Impact of inter-patch spectrogram reconstruction",
        (
            Entry("Base", "base", 0.371, 0.537),
            Entry("+Inter-SSR", "inter-ssr-75", 0.379, 0.544),
            Entry("+HOG Weight", "inter-ssr-hog", 0.382, 0.546),
        ),
    ),
    5: (
        "Impact of inter-patch feature reconstruction",
        (
            Entry("Base", "inter-ssr-hog", 0.382, 0.546),
            Entry("+inter-SSF & mse", "inter-mse", 0.387, 0.551),
            Entry("+inter-SSF & KL", "inter-kl", 0.389, 0.552),
            Entry("+inter-SSF & cont", "inter-ss", 0.394, 0.561),
        ),
    ),
    6: (
        "Impact of multidimensional self-supervision",
        (
            Entry("Base", "base", 0.371, 0.537),
            Entry("intra-SS", "intra-ss", 0.391, 0.557),
            Entry("inter-SS", "inter-ss", 0.394, 0.561),
            Entry("intra-SS & inter-SS", "multi-ssl", 0.402, 0.566),
        ),
    ),
    7: (
        "Influence of starting weights on multidimensional self-supervision",
        (
            Entry("Random Init", "multi-ssl", 0.402, 0.566),
            Entry("ImageNet Init", "imagenet", 0.404, 0.570),
        ),
    ),
    8: (
        "Impact of teachers",
        (
            Entry("None", "multi-ssl", 0.402, 0.566),
            Entry("AST", "teacher-AST", 0.405, 0.568),
            Entry("SPFA", "teacher-SPFA", 0.406, 0.571),
            Entry("BEATS", "teacher-BEATS", 0.409, 0.575),
        ),
    ),
    9: (
        "Effect of the number of iterations",
        (
            Entry("iter1", "iterations", 0.409, 0.575, "iter1-distill"),
            Entry("iter2", "iterations", 0.415, 0.583, "iter2-distill"),
            Entry("iter3", "iterations", 0.417, 0.586, "iter3-distill"),
            Entry("(ensemble)", "iterations", None, None, "ensemble"),
            Entry("(the teacher itself)", "iterations", None, None, "teacher"),
        ),
    ),
}
"""By the paper's number: title, rows. Rows in parentheses are ours."""

METHODS: dict[int, tuple[str, tuple[tuple[str, str, str, float], ...]]] = {
    10: (
        "AudioSet, mAP",
        (
            ("PANN", "81M", "-", 0.431),
            ("PSLA", "14M", "ImageNet", 0.444),
            ("ERANN", "55M", "-", 0.450),
            ("AST", "86M", "ImageNet + AudioSet", 0.459),
            ("PaSST", "86M", "ImageNet + AudioSet", 0.471),
            ("Hts-at", "31M", "ImageNet + AudioSet", 0.471),
            ("MaskedSpec", "86M", "AudioSet", 0.471),
            ("CAV-MAE", "94M", "ImageNet + AudioSet", 0.449),
            ("SPFA (Single)", "87M", "-", 0.464),
            ("BEATS (iter1)", "90M", "AudioSet", 0.479),
            ("BEATS (iter2)", "90M", "AudioSet", 0.481),
            ("BEATS (iter3)", "90M", "AudioSet", 0.480),
            ("BEATS (iter3+)", "90M", "AudioSet", 0.486),
            ("ACM-SSKD (iter1)", "92M", "ImageNet + AudioSet", 0.483),
            ("ACM-SSKD (iter2)", "92M", "ImageNet + AudioSet", 0.486),
            ("ACM-SSKD (iter3)", "92M", "ImageNet + AudioSet", 0.492),
            ("ACM-SSKD (Ensemble)", "92M", "ImageNet + AudioSet", 0.499),
        ),
    ),
    11: (
        "VGGSound, accuracy",
        (
            ("VGGSound", "81M", "-", 0.488),
            ("CAV-MAE", "87M", "ImageNet + AudioSet", 0.595),
            ("MBT", "87M", "ImageNet 21K", 0.523),
            ("Aud-SlowFast", "-", "-", 0.501),
            ("MAViL", "87M", "ImageNet + AudioSet", 0.608),
            ("ACM-SSKD (iter1)", "92M", "ImageNet + AudioSet", 0.579),
            ("ACM-SSKD (iter2)", "92M", "ImageNet + AudioSet", 0.588),
            ("ACM-SSKD (iter3)", "92M", "ImageNet + AudioSet", 0.605),
            ("ACM-SSKD (Ensemble)", "92M", "ImageNet + AudioSet", 0.613),
        ),
    ),
    12: (
        "ESC-50, accuracy",
        (
            ("PANN", "81M", "-", 0.947),
            ("AST", "86M", "ImageNet", 0.956),
            ("ERANN", "55M", "AudioSet", 0.961),
            ("Audio-MAE", "86M", "AudioSet", 0.974),
            ("Ssast", "89M", "AudioSet + LibriSpeech", 0.888),
            ("MaskedSpec", "86M", "AudioSet", 0.896),
            ("Mae-ast", "86M", "AudioSet + LibriSpeech", 0.900),
            ("SPFA", "87M", "-", 0.968),
            ("BEATS (iter3)", "90M", "AudioSet", 0.956),
            ("BEATS (iter3+)", "90M", "AudioSet", 0.981),
            ("ACM-SSKD (iter1)", "92M", "ImageNet + AudioSet", 0.962),
            ("ACM-SSKD (iter2)", "92M", "ImageNet + AudioSet", 0.975),
            ("ACM-SSKD (iter3)", "92M", "ImageNet + AudioSet", 0.984),
            ("ACM-SSKD (Ensemble)", "92M", "ImageNet + AudioSet", 0.987),
        ),
    ),
}
"""Tables 10 to 12 by number: data set and metric; (method, parameters, pre-trained data, printed result)."""
