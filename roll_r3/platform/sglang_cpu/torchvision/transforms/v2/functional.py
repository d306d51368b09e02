"""Copy of `torchvision.transforms.functional`."""

from torchvision.transforms.functional import InterpolationMode as InterpolationMode
from torchvision.transforms.functional import __getattr__ as __getattr__
