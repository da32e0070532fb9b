"""SmolLM2-135M-Instruct: a small real language model to run the library on."""

from .gguf_file import BadGGUF as BadGGUF
from .gguf_file import GGUFFile as GGUFFile
from .gguf_file import MissingWeights as MissingWeights
from .gguf_file import find_weights as find_weights
from .gguf_file import put_weights as put_weights
from .model import Config as Config
from .model import Model as Model
from .model import Weights as Weights
from .split import WeightSplit as WeightSplit
from .tokenizer import ChatTokenizer as ChatTokenizer
from .tokenizer import TextStream as TextStream
