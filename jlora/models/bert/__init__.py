"""BERT, RoBERTa, and what shares their architecture."""

from jlora.models.bert._config import BertConfig as BertConfig
from jlora.models.bert._model import Bert as Bert
from jlora.models.bert._model import BertClassifier as BertClassifier
from jlora.models.bert._model import BertMaskedLM as BertMaskedLM
from jlora.models.bert._model import label_loss as label_loss
from jlora.models.bert._model import mean_pool as mean_pool
