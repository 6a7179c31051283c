"""Tasks: what training scripts share, so that each is read in five minutes.

    AdapterOptions  TrainingOptions    options of the command line, and what they mean
    DeviceOptions                      those that spread a run over devices
    seq2seq_loss  causal_loss  classification_loss      the loss of a kind of model
    preference_loss  step_memory       DPO's, and what a step takes
    Generator                          a model's answers, in files
    Translation  TranslationSettings   from text to text, measured by BLEU
    DataToText  DataToTextSettings     from data to text, measured as E2E is
    Grid  GridRun                      runs of many settings: table, pictures, advice
    Chat  ChatSettings                 conversations, the assistant's answers learned
    Preferences  PreferenceSettings    of two answers the better one: DPO
    Classification  ClassificationSettings  GLUE     sentences to classes or numbers
    Classifier  class_scores           a classifier that is asked, and its metrics
    Router                             classifiers on one encoder, in mixed batches
    run  KINDS                         a whole task, as `jlora train` runs it
    compare  METHODS                   one task by full fine-tuning, LoRA, DoRA, QLoRA

The examples are composed of these; nothing here is needed to use jlora.
"""

from jlora.tasks._chats import Answers as Answers
from jlora.tasks._chats import ChatOptions as ChatOptions
from jlora.tasks._chats import Measure as Measure
from jlora.tasks._classifier import Classifier as Classifier
from jlora.tasks._classifier import class_scores as class_scores
from jlora.tasks._classifier import logits_of as logits_of
from jlora.tasks._compare import METHODS as METHODS
from jlora.tasks._compare import Comparison as Comparison
from jlora.tasks._compare import Outcome as Outcome
from jlora.tasks._compare import compare as compare
from jlora.tasks._devices import DeviceOptions as DeviceOptions
from jlora.tasks._examples import Examples as Examples
from jlora.tasks._examples import read_examples as read_examples
from jlora.tasks._generation import Generator as Generator
from jlora.tasks._glue import GLUE as GLUE
from jlora.tasks._glue import GlueTask as GlueTask
from jlora.tasks._glue import glue_examples as glue_examples
from jlora.tasks._grid import Grid as Grid
from jlora.tasks._grid import GridRun as GridRun
from jlora.tasks._losses import Loss as Loss
from jlora.tasks._losses import causal_loss as causal_loss
from jlora.tasks._losses import classification_loss as classification_loss
from jlora.tasks._losses import seq2seq_loss as seq2seq_loss
from jlora.tasks._memory import step_memory as step_memory
from jlora.tasks._options import AdapterOptions as AdapterOptions
from jlora.tasks._options import Loaded as Loaded
from jlora.tasks._options import TrainingOptions as TrainingOptions
from jlora.tasks._options import count_both_sides as count_both_sides
from jlora.tasks._options import count_tokens as count_tokens
from jlora.tasks._options import refuse as refuse
from jlora.tasks._reports import closing_part as closing_part
from jlora.tasks._reports import print_facts as print_facts
from jlora.tasks._reports import training_part as training_part
from jlora.tasks._routing import Router as Router
from jlora.tasks._run import KINDS as KINDS
from jlora.tasks._run import Kind as Kind
from jlora.tasks._run import Task as Task
from jlora.tasks._run import facts_of as facts_of
from jlora.tasks._run import run as run
from jlora.tasks.chat import Chat as Chat
from jlora.tasks.chat import ChatSettings as ChatSettings
from jlora.tasks.classification import Classification as Classification
from jlora.tasks.classification import ClassificationSettings as ClassificationSettings
from jlora.tasks.data_to_text import DataToText as DataToText
from jlora.tasks.data_to_text import DataToTextSettings as DataToTextSettings
from jlora.tasks.data_to_text import EncodeMeanings as EncodeMeanings
from jlora.tasks.data_to_text import Meaning as Meaning
from jlora.tasks.data_to_text import read_meanings as read_meanings
from jlora.tasks.data_to_text import say_columns as say_columns
from jlora.tasks.preference import LIKELIER as LIKELIER
from jlora.tasks.preference import Preferences as Preferences
from jlora.tasks.preference import PreferenceSettings as PreferenceSettings
from jlora.tasks.preference import answer_scores as answer_scores
from jlora.tasks.preference import preference_loss as preference_loss
from jlora.tasks.translation import Translation as Translation
from jlora.tasks.translation import TranslationSettings as TranslationSettings

__all__ = [name for name in dir() if not name.startswith("_")]


def __dir__() -> list[str]:
    return __all__
