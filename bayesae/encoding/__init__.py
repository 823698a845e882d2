"""Values of the library as JSON and tensors, and the one file that both go into."""

from bayesae.encoding.file import read, write
from bayesae.encoding.values import CALIBRATIONS, flatten, unflatten

__all__ = ["CALIBRATIONS", "flatten", "read", "unflatten", "write"]
