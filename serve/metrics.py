"""Prometheus metrics by `ray.serve.metrics`; Ray adds application, deployment and replica to each."""

from __future__ import annotations

from ray.serve.metrics import Counter, Gauge, Histogram

SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]


class IngressMetrics:
    """What clients see."""

    def __init__(self) -> None:
        self.requests = Counter("hypersd_requests", "Requests for images, by answer.", ("status", "code"))
        self.in_flight = Gauge("hypersd_requests_in_flight", "Requests for images being worked on or waiting.")
        self.seconds = Histogram(
            "hypersd_stage_seconds",
            "Time of a request by stage: read, queue, text, denoise, preview, decode, check, encode, total.",
            SECONDS, ("stage", "lora", "steps"),
        )  # fmt: skip
        self.images = Counter("hypersd_images", "Images sent.", ("lora", "steps"))
        self.gone = Counter("hypersd_clients_gone", "Requests whose client left before the answer.")


class DenoiserMetrics:
    """What the device does."""

    def __init__(self) -> None:
        self.waiting = Gauge("hypersd_images_waiting", "Images waiting for their turn on a replica.")
        self.batch = Histogram(
            "hypersd_batch_images", "Images of a batch.", [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64], ("lora", "steps")
        )
        self.busy = Counter("hypersd_device_seconds", "Time the device spent on batches.", ("lora", "steps"))
        self.switches = Counter("hypersd_lora_switches", "Changes of the LoRA in the weights.", ("lora",))
        self.abandoned = Counter("hypersd_images_abandoned", "Images dropped before their turn: their client had gone.")
