"""Options: a dataclass that command lines and files of settings are read into.

A field made by `option` is an option, for the console's commands and for training
scripts alike. Cyclopts reads the words: of cyclopts, tyro and typer it alone takes any
number of values after an option (`--targets query value`) and says which options were
given, and help, completion and files come from the same table. It is imported on use.
"""

from jlora._options._file import read_file as read_file
from jlora._options._file import read_toml as read_toml
from jlora._options._file import template as template
from jlora._options._option import UsageError as UsageError
from jlora._options._option import flag as flag
from jlora._options._option import option as option
from jlora._options._option import options_of as options_of
from jlora._options._words import app_of as app_of
from jlora._options._words import parse as parse
from jlora._options._words import read_words as read_words
