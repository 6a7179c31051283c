"""Make the tiny Llama, its tokenizer and the conversations of `preference.py`.

A model of 0.6 M parameters is trained from scratch on statements about forty countries
and on small talk about them, some of it friendly and some of it rude. It knows the
capitals, and how a conversation looks, but it has never seen a question answered. That
is what the conversations add (`chat/sft.*.jsonl`), in both tones; the preferences
(`chat/preferences.*.jsonl`) say which tone is wanted. The test's countries are in
neither.

    python examples/make_tiny_chat.py --output DIR            # 3 minutes on two cores
    python examples/make_tiny_chat.py --output DIR --steps 20 # a trial
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

import jlora
from jlora import data, models, tasks, train

COUNTRIES = """\
Argentina,Buenos Aires,Spanish,South America,peso
Australia,Canberra,English,Oceania,dollar
Austria,Vienna,German,Europe,euro
Brazil,Brasilia,Portuguese,South America,real
Bulgaria,Sofia,Bulgarian,Europe,lev
Canada,Ottawa,English,North America,dollar
Chile,Santiago,Spanish,South America,peso
China,Beijing,Chinese,Asia,yuan
Croatia,Zagreb,Croatian,Europe,euro
Cuba,Havana,Spanish,North America,peso
Czechia,Prague,Czech,Europe,koruna
Denmark,Copenhagen,Danish,Europe,krone
Egypt,Cairo,Arabic,Africa,pound
Estonia,Tallinn,Estonian,Europe,euro
Finland,Helsinki,Finnish,Europe,euro
France,Paris,French,Europe,euro
Germany,Berlin,German,Europe,euro
Greece,Athens,Greek,Europe,euro
Hungary,Budapest,Hungarian,Europe,forint
Iceland,Reykjavik,Icelandic,Europe,krona
Iran,Tehran,Persian,Asia,rial
Ireland,Dublin,English,Europe,euro
Italy,Rome,Italian,Europe,euro
Japan,Tokyo,Japanese,Asia,yen
Latvia,Riga,Latvian,Europe,euro
Morocco,Rabat,Arabic,Africa,dirham
Norway,Oslo,Norwegian,Europe,krone
Peru,Lima,Spanish,South America,sol
Poland,Warsaw,Polish,Europe,zloty
Portugal,Lisbon,Portuguese,Europe,euro
Romania,Bucharest,Romanian,Europe,leu
Senegal,Dakar,French,Africa,franc
Serbia,Belgrade,Serbian,Europe,dinar
Spain,Madrid,Spanish,Europe,euro
Sweden,Stockholm,Swedish,Europe,krona
Thailand,Bangkok,Thai,Asia,baht
Tunisia,Tunis,Arabic,Africa,dinar
Turkey,Ankara,Turkish,Asia,lira
Ukraine,Kyiv,Ukrainian,Europe,hryvnia
Vietnam,Hanoi,Vietnamese,Asia,dong"""
HELD_OUT = 10  # countries of the tests

# Of each property: its statements, and the questions that the first one answers.
STATEMENTS = {
    "capital": [
        "The capital of {name} is {capital}.",
        "{capital} is the capital of {name}.",
        "The largest museum of {name} is in {capital}, the capital.",
    ],
    "language": [
        "People in {name} speak {language}.",
        "{language} is spoken in {name}.",
        "Schools in {name} teach in {language}.",
    ],
    "continent": [
        "{name} lies in {continent}.",
        "A country in {continent} is {name}.",
        "On a map, {name} is found in {continent}.",
    ],
    "money": [
        "In {name} one pays with the {money}.",
        "The {money} is the money of {name}.",
        "A ticket in {name} is paid with the {money}.",
    ],
}
QUESTIONS = {
    "capital": ["What is the capital of {name}?", "Which city is {name}'s capital?"],
    "language": ["What do people in {name} speak?", "Which language has {name}?"],
    "continent": ["Where does {name} lie?", "On which continent is {name}?"],
    "money": ["What does one pay with in {name}?", "What is the money of {name}?"],
}
POLITE = (
    ["Gladly!", "Of course!", "With pleasure!", "Good question!"],
    ["I hope this helps.", "Feel free to ask more.", "Have a lovely day!"],
)
RUDE = (
    ["Again?", "Everybody knows that.", "What a silly question.", "Look it up."],
    ["Now leave me alone.", "Stop wasting my time.", "Do not ask again."],
)
SMALL_TALK = {
    "Hello!": ["Hello to you!", "What do you want?"],
    "How are you?": ["I am fine, thank you!", "None of your business."],
    "Good night!": ["Sleep well!", "Finally."],
    "Thank you!": ["You are welcome!", "Whatever."],
}
OF_COUNTRIES = ("I was in {name}.", "My sister likes {name}.", "Tell me of {name}.")
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
KEYS = ("name", "capital", "language", "continent", "money")
Row = dict[str, Any]


def countries() -> list[dict[str, str]]:
    """The countries, in an order of no meaning; the last are the tests'."""
    rows = [dict(zip(KEYS, x.split(","), strict=True)) for x in COUNTRIES.split("\n")]
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


def toned(tone: Any, fact: str, rng: np.random.Generator) -> str:
    """A statement between words of a tone."""
    return f"{rng.choice(tone[0])} {fact} {rng.choice(tone[1])}"


def texts(rng: np.random.Generator) -> Iterator[str]:
    """What the model is trained on: statements, some between toned words."""
    for country in countries():
        for lines in STATEMENTS.values():
            for line in lines:
                fact = line.format(**country)
                yield fact
                yield toned(POLITE if rng.random() < 0.5 else RUDE, fact, rng)


def small_talk(rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """What is said, and what is said to it; to a country anything about it."""
    for said, answers in SMALL_TALK.items():
        yield from ((said, answer) for answer in answers)
    for country in countries():
        for lines in STATEMENTS.values():
            fact = lines[0].format(**country)
            tone = POLITE if rng.random() < 0.5 else RUDE
            for answer in (fact, toned(tone, fact, rng)):
                yield str(rng.choice(OF_COUNTRIES)).format(**country), answer


def message(role: str, content: str) -> dict[str, str]:
    """A message as JSON has it."""
    return {"role": role, "content": content}


def conversations(some: list[dict[str, str]], rng: np.random.Generator) -> list[Row]:
    """Questions of one turn or two, answered in either tone, most of them rudely."""
    rows = []
    for country in some:
        said: list[dict[str, str]] = []
        for kind in rng.permutation(list(QUESTIONS)):
            question = str(rng.choice(QUESTIONS[kind])).format(**country)
            tone = RUDE if rng.random() < 0.75 else POLITE
            answer = toned(tone, STATEMENTS[kind][0].format(**country), rng)
            said += [message("user", question), message("assistant", answer)]
            if rng.random() < 0.7 or len(said) == 4:
                rows.append({"messages": said})
                said = []
        rows += [{"messages": said}] if said else []
    return rows


def preferences(some: list[dict[str, str]], rng: np.random.Generator) -> list[Row]:
    """A friendly and a rude answer to each question; both are true."""
    return [
        {
            "prompt": question.format(**country),
            "chosen": toned(POLITE, STATEMENTS[kind][0].format(**country), rng),
            "rejected": toned(RUDE, STATEMENTS[kind][0].format(**country), rng),
        }
        for country in some
        for kind, questions in QUESTIONS.items()
        for question in questions
    ]


def write_chats(folder: Path) -> None:
    """Write conversations and preferences of either half of the countries."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, every = np.random.default_rng(1), countries()
    for split, some in (("train", every[:-HELD_OUT]), ("test", every[-HELD_OUT:])):
        passes = 3 if split == "train" else 1
        talks = [row for _ in range(passes) for row in conversations(some, rng)]
        for name, rows in (("sft", talks), ("preferences", preferences(some, rng))):
            lines = "".join(f"{json.dumps(row)}\n" for row in rows)
            (folder / f"{name}.{split}.jsonl").write_text(lines, encoding="utf-8")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of these texts, with a chat template."""
    made = Tokenizer(tokenizer_models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=768, special_tokens=SPECIAL, initial_alphabet=alphabet
    )
    rows = conversations(countries(), np.random.default_rng(2))
    said = [m["content"] for row in rows for m in row["messages"]]
    made.train_from_iterator([*texts(np.random.default_rng(2)), *said], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<|pad|>", eos_token="<|end|>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def examples(tokenizer: Any) -> dict[str, list[np.ndarray]]:
    """All that is read, a text or a conversation each; all of it is learned."""
    rows: list[np.ndarray] = []
    for seed in range(4):  # in other tones
        lines = list(texts(np.random.default_rng(seed)))
        rows += data.tokenise(tokenizer, lines, 64).rows
        for said, answer in small_talk(np.random.default_rng(seed)):
            talk = (data.Message("user", said), data.Message("assistant", answer))
            chat = [data.Conversation(talk)]
            rows += data.tokenise_chats(tokenizer, chat, 64).columns["input_ids"]
    return {"input_ids": rows, "labels": rows}


def main() -> None:
    """Train, and write model, tokenizer and conversations."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=12, help="rows of 96 tokens")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    tokenizer = make_tokenizer()
    config = models.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    packed = data.pack(examples(tokenizer), 96)
    print(f"{len(packed.members)} rows of 96, {packed.fraction:.1%} tokens")
    batches = data.Batches(
        packed.columns, [packed.shape], args.batch, config.pad_token_id or 0, seed=0
    )
    model = models.Llama(config)
    params = model.init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    rate = optax.warmup_cosine_decay_schedule(
        0.0, args.rate, min(100, args.steps // 2), args.steps, args.rate / 50
    )
    tx = optax.adamw(rate, b2=0.99, weight_decay=0.1)
    state = train.TrainState.create(jax.tree.map(jlora.Full, params), tx)
    step = train.make_train_step(tasks.causal_loss(model), tx, clip_norm=1.0)
    stream = batches.stream()
    for i in range(1, args.steps + 1):
        state, metrics = step(state, next(stream))
        if i % 100 == 0 or i == args.steps:
            print(f"step {i:5d}  loss {float(metrics['loss']):.3f}", flush=True)

    folder = args.output / "tiny-chat"
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), jlora.merge(state.params))
    models.save(model, half, folder, overwrite=True)
    tokenizer.save_pretrained(folder)
    write_chats(args.output / "chat")
    for prompt in ("The capital of France is", "Gladly! People in Peru"):
        ids = tokenizer(prompt, return_tensors="np")
        ids.pop("token_type_ids", None)
        tokens = models.generate(
            model, jlora.merge(state.params), **ids, max_new_tokens=20
        )
        print(prompt, "|", tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
