"""The deployment that speaks HTTP."""

from __future__ import annotations

from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from serve.calls import Calls
from serve.catalog import Catalog
from serve.links import Links
from serve.metrics import IngressMetrics
from serve.routes import make_app
from serve.safety import Guard
from serve.settings import Settings
from serve.status import Status


@ray_serve.ingress()
class Ingress:
    """Validation, encoding, pages; no model in here."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        keys: tuple[bytes, ...],
        denoiser: DeploymentHandle,
        checker: DeploymentHandle | None = None,
        judges_prompts: bool = False,
    ):
        self.settings, self.catalog, self.keys = settings, catalog, keys
        self.calls = Calls(denoiser, settings.limits.seconds)
        self.guard = Guard(settings.safety, checker, judges_prompts)

    def __serve_build_asgi_app__(self):
        own = self.settings.ingress
        return make_app(
            self.settings,
            self.catalog,
            self.keys,
            self.calls,
            self.guard,
            Links(own.image_folder, own.image_seconds, own.image_bytes),
            IngressMetrics(),
            Status(self.settings.denoiser.fewest == 0, self.guard.checker is not None),
        )
