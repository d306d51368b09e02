"""Substitute module: every name can be imported, and raises when called."""

from collections.abc import Callable

from torchvision.transforms import InterpolationMode as InterpolationMode


def __getattr__(name: str) -> Callable[..., None]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"torchvision.transforms.functional.{name}: image models need a real torchvision")

    return missing
