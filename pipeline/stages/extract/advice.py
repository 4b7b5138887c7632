"""What would make the next run faster, told from where the time of this one went."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config import ExtractionConfig
from pipeline.embed.engines import openvino_is_there
from pipeline.embed.precision import choice_inputs
from pipeline.embed.spec import EmbeddingSpec
from pipeline.stages.extract.work import Work


def advise(work: Work, specs: Sequence[EmbeddingSpec], extraction: ExtractionConfig) -> str:
    """Return one line: what took longest, and what to change about it.

    Reading and decoding are summed over threads, which work beside the network; baselines are made in the network's place.
    """
    seconds = work.seconds
    baselines = {spec.name: work.network_seconds.get(spec.name, 0.0) for spec in specs if spec.kind == "baseline"}
    spans = {
        "start-up": seconds["start-up"],
        "reading files": seconds["read"] / work.workers,
        "decoding": seconds["decode"] / work.workers,
        "the network": seconds["network"] - sum(baselines.values()),
        "writing": seconds["write"],
        **baselines,
    }
    longest = max(spans, key=lambda name: spans[name])
    if longest in baselines:
        return f"most of the time went on the baseline {longest}; leaving it out of baselines would make it faster"
    disk = "a faster or nearer disk"
    remedies = {
        "reading files": disk,
        "decoding": _DECODING[extraction.decode],
        "the network": _about_network(specs, extraction),
        "writing": f"{disk} for the output folder",
    }
    remedy = f"{remedies[longest]} would make it faster" if longest in remedies else PAID_ONCE
    return f"most of the time went on {longest}; {remedy}"


PAID_ONCE = "it is paid once, however many images there are"
_DECODING = {
    "exact": "extraction.decode: standard or fast",
    "standard": "more processors, or for photos much larger than the network sees extraction.decode: fast,",
    "fast": "more processors",
}


def _about_network(specs: Sequence[EmbeddingSpec], extraction: ExtractionConfig) -> str:
    networks = [spec for spec in specs if spec.kind == "backbone"]
    remedies = []
    if extraction.precision == "fp32" and choice_inputs()["bf16"]:
        remedies.append("extraction.precision: auto, as this processor computes in bf16")
    if extraction.engine == "auto" and all(spec.engine == "torch" for spec in networks) and not openvino_is_there():
        remedies.append("OpenVINO (pip install 'manyheads[openvino]')")
    if extraction.engine == "torch" and openvino_is_there():
        remedies.append("extraction.engine: auto, as OpenVINO is installed")
    return " or ".join([*remedies, "a GPU or a smaller network"])
