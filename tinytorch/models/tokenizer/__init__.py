"""The tokenizer of a downloaded model, from its files: GPT-2's, Llama's and Qwen2's, with lesson 10's BPE.

Written by hand, not built from a lesson. `files` reads the files; `bpe` cuts a text into ids and back with lesson 10's
functions, `added` finds the tokens that were added to a vocabulary, `steps` are what tokenizer.json names around them,
`patterns` its regular expressions, and `parts` names the file and the place in every error.

The ids are those of the `tokenizers` library, except for characters that are newer than one of the Unicode tables at
hand: this Python's (unicodedata.unidata_version), and the library's, which are of several versions.
"""

from tinytorch.models.tokenizer.bpe import FileTokenizer
from tinytorch.models.tokenizer.files import load_tokenizer

__all__ = ["FileTokenizer", "load_tokenizer"]
