"""Data: text and tables read to the letter, tokenised, and cut into batches.

    read_pairs  read_dataset_pairs     sentences beside their translations
    read_table  read_lines             any table, any text file
    subset  hold_out                   some of the examples, and others held out
    tokenise  prompted                 text to tokens, with what that costs it
    shapes_for  Batches                length buckets, in an order that resumes
    pack                               several examples in a row, kept apart
    stream_files  stream_dataset  in_memory    sources that need not fit in memory
    Streaming                              their batches, mixed, by worker processes
    EncodeTexts  EncodePairs  EncodeChats      what workers do with rows
    sample_shapes                              its shapes
    read_conversations  read_preferences    chats, and answers of which one is better
    tokenise_chats  chat_prompt        by the tokenizer's template, answers labelled

What is read is never guessed: a file is what its name says, or an error that names the
line. Nothing here knows of models or of LoRA.
"""

from jlora.data._batches import IGNORED as IGNORED
from jlora.data._batches import Batch as Batch
from jlora.data._batches import Batches as Batches
from jlora.data._batches import Shape as Shape
from jlora.data._batches import shapes_for as shapes_for
from jlora.data._chat import Conversation as Conversation
from jlora.data._chat import Message as Message
from jlora.data._chat import Preference as Preference
from jlora.data._chat import read_conversations as read_conversations
from jlora.data._chat import read_preferences as read_preferences
from jlora.data._chat_encode import EncodeChats as EncodeChats
from jlora.data._chat_tokens import ChatTokens as ChatTokens
from jlora.data._chat_tokens import PreferenceTokens as PreferenceTokens
from jlora.data._chat_tokens import chat_prompt as chat_prompt
from jlora.data._chat_tokens import tokenise_chats as tokenise_chats
from jlora.data._chat_tokens import tokenise_preferences as tokenise_preferences
from jlora.data._chat_tokens import with_template as with_template
from jlora.data._dataset import read_dataset as read_dataset
from jlora.data._dataset import read_dataset_pairs as read_dataset_pairs
from jlora.data._encode import EncodePairs as EncodePairs
from jlora.data._encode import EncodeTexts as EncodeTexts
from jlora.data._encode import sample_shapes as sample_shapes
from jlora.data._languages import LANGUAGES as LANGUAGES
from jlora.data._languages import Direction as Direction
from jlora.data._languages import direction as direction
from jlora.data._packing import Packed as Packed
from jlora.data._packing import pack as pack
from jlora.data._parallel import Pair as Pair
from jlora.data._parallel import read_pairs as read_pairs
from jlora.data._sources import Source as Source
from jlora.data._sources import in_memory as in_memory
from jlora.data._sources import stream_dataset as stream_dataset
from jlora.data._sources import stream_files as stream_files
from jlora.data._splits import hold_out as hold_out
from jlora.data._splits import subset as subset
from jlora.data._streaming import Reading as Reading
from jlora.data._streaming import Streaming as Streaming
from jlora.data._table import Table as Table
from jlora.data._table import is_table as is_table
from jlora.data._table import read_table as read_table
from jlora.data._text import read_lines as read_lines
from jlora.data._tokens import Tokens as Tokens
from jlora.data._tokens import load_tokenizer as load_tokenizer
from jlora.data._tokens import prompted as prompted
from jlora.data._tokens import tokenise as tokenise

__all__ = [name for name in dir() if not name.startswith("_")]


def __dir__() -> list[str]:
    return __all__
