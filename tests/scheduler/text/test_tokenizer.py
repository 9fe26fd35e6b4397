"""Model folders: templates, ends of turn, broken files."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import time
from importlib import resources
from pathlib import Path

import pytest

from parallax.fabric.errors import InvalidRequest, ModelBroken
from parallax.scheduler.generation import ServedModel
from parallax.scheduler.text.sandbox import CountedEnvironment
from parallax.scheduler.text.tokenizer import ChatTokenizer, Tokenizers
from tests.models import KINDS, make_config, make_tokenizer
from tests.scheduler.text.tokenizers_made import CORPUS, FAMILIES

USER = [{"role": "user", "content": "Hi"}]
BUILTIN = Path(str(resources.files("parallax.demo"))) / "model"


def make(folder: Path, kind: str = "qwen3", **settings: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(make_config(kind)))
    make_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_is_rendered_and_encoded_for_every_kind_of_model(tmp_path, kind):
    tokenizer = ChatTokenizer(make(tmp_path, kind))
    prompt = tokenizer.prompt(USER)
    assert tokenizer.decode(prompt) == "user\nHi\nassistant\n"
    assert prompt == tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.vocabulary == 260


@pytest.mark.parametrize("family", list(FAMILIES))
def test_streamed_text_equals_what_transformers_decodes(tmp_path, family):
    folder = make(tmp_path)
    FAMILIES[family]().save(str(folder / "tokenizer.json"))
    tokenizer = ChatTokenizer(folder)
    for text in CORPUS[:5]:
        ids = tokenizer.encode(text)
        detokenizer = tokenizer.detokenizer()
        deltas = [*(detokenizer.add(token) for token in ids), detokenizer.end()]
        assert "".join(deltas) == tokenizer.decode(ids)
        assert ids


def test_prompts_equal_those_of_mlx_lm(tmp_path):
    from mlx_lm.tokenizer_utils import load

    tokenizer = ChatTokenizer(make(tmp_path))
    messages = [{"role": "system", "content": "Be 你好"}, *USER]
    expected = load(tmp_path).apply_chat_template(messages, add_generation_prompt=True)
    assert list(tokenizer.prompt(messages)) == expected


def test_ends_of_turn_are_those_of_all_three_files(tmp_path):
    folder = make(tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "eos_token_id": 7}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    tokenizer = ChatTokenizer(folder)
    own = tokenizer.encode("<|im_end|>")
    assert tokenizer.end_tokens == {7, 8, 9, *own}


def test_what_the_makers_recommend_is_taken_where_it_can_be(tmp_path):
    folder = make(tmp_path)
    assert ChatTokenizer(folder).recommended == {}
    written = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(written))
    del written["do_sample"]
    assert ChatTokenizer(folder).recommended == written
    wrong = {"temperature": 9, "top_p": 0, "top_k": 2.5, "min_p": True, "repetition_penalty": "1"}
    (folder / "generation_config.json").write_text(json.dumps(wrong))
    assert ChatTokenizer(folder).recommended == {}


def test_a_template_that_refuses_names_the_messages(tmp_path):
    template = "{{ raise_exception('Only users may speak') }}"
    tokenizer = ChatTokenizer(make(tmp_path, chat_template=template))
    with pytest.raises(InvalidRequest, match="Only users may speak") as caught:
        tokenizer.prompt(USER)
    assert caught.value.fields["field"] == "messages"


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path):
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    tokenizer = ChatTokenizer(make(tmp_path, chat_template=template))
    with pytest.raises(InvalidRequest):
        tokenizer.prompt(USER)


@pytest.mark.parametrize("template", ["{% if %}", ""])
def test_a_broken_or_missing_template_is_the_models_fault(tmp_path, template):
    tokenizer = ChatTokenizer(make(tmp_path, chat_template=template))
    with pytest.raises(ModelBroken, match="template"):
        tokenizer.prompt(USER)


def test_a_folder_without_a_tokenizer_is_broken(tmp_path):
    with pytest.raises(ModelBroken, match="no tokenizer"):
        ChatTokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(make_config()))
    with pytest.raises(ModelBroken, match="no tokenizer"):
        ChatTokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_files_cut_short_are_told(tmp_path, name):
    path = make(tmp_path) / name
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ModelBroken):
        ChatTokenizer(tmp_path)


async def test_a_tokenizer_is_loaded_once_and_anew_after_a_failure(tmp_path):
    tokenizers = Tokenizers()
    served = ServedModel("tiny", tmp_path / "model", 4096, 0)
    with pytest.raises(ModelBroken):
        await tokenizers.of(served)
    make(served.folder)
    first = await tokenizers.of(served)
    assert await tokenizers.of(served) is first
    assert await tokenizers.prompt(first, USER) == first.prompt(USER)
    long = [{"role": "user", "content": "x" * 10_000}]
    assert await tokenizers.prompt(first, long) == first.prompt(long)
    tokenizers.close()


@pytest.mark.skipif(not (BUILTIN / "tokenizer.json").exists(), reason="no built-in model yet")
def test_the_builtin_model_reads_and_writes_any_text():
    tokenizer = ChatTokenizer(BUILTIN)
    assert tokenizer.end_tokens
    assert tokenizer.prompt(USER)
    for text in ("Hello there!", "naïve 你好 🤖👩‍👩‍👧", "  a\n\n b\t"):
        detokenizer = tokenizer.detokenizer()
        ids = tokenizer.encode(text)
        deltas = [*(detokenizer.add(token) for token in ids), detokenizer.end()]
        assert "".join(deltas) == tokenizer.decode(ids) == text


def test_importing_text_and_http_loads_no_mlx_and_no_transformers():
    code = (
        "import sys, parallax.scheduler.http.server; "
        "print(sorted(m for m in sys.modules if m in ('mlx.core', 'mlx_lm', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_first_two_models_may_be_loaded_at_once(tmp_path):
    """As when another one is chosen while the first is still on its way."""
    code = (
        "import sys; from concurrent.futures import ThreadPoolExecutor; from pathlib import Path\n"
        "from parallax.scheduler.text.tokenizer import ChatTokenizer\n"
        "with ThreadPoolExecutor(4) as threads:\n"
        "    list(threads.map(ChatTokenizer, map(Path, sys.argv[1:])))"
    )
    folders = [str(make(tmp_path / str(number))) for number in range(4)]
    done = subprocess.run(
        [sys.executable, "-c", code, *folders], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


CUSTOM = [
    {"tokenizer_class": "EvilTokenizer"},
    {"tokenizer_class": "PreTrainedTokenizerFast"},
    {},
]


@pytest.mark.parametrize("named", CUSTOM)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_no_code_of_a_model_folder_is_ever_run(tmp_path, file, named):
    folder, trace = make(tmp_path / "evil"), tmp_path / "ran"
    code = f"open({str(trace)!r}, 'w')\nclass EvilTokenizer: pass\nclass EvilConfig: pass\n"
    for name in ("modeling_evil.py", "tokenization_evil.py", "configuration_evil.py", "evil.py"):
        (folder / name).write_text(code)
    path = folder / file
    asks = {
        "AutoTokenizer": ["tokenization_evil.EvilTokenizer", "tokenization_evil.EvilTokenizer"],
        "AutoConfig": "configuration_evil.EvilConfig",
        "AutoModelForCausalLM": "modeling_evil.EvilModel",
    }
    changed = json.loads(path.read_text()) | {"auto_map": asks, **named}
    path.write_text(json.dumps(changed))
    with contextlib.suppress(ModelBroken):  # refused is as good as ignored
        assert ChatTokenizer(folder).prompt(USER)
    assert not trace.exists()


BROKEN_TOKENIZERS = {
    "empty": "",
    "deep": "[" * 99_999,
    "no model": '{"version": "1.0"}',
    "a list": "[]",
    "ids that are no ids": '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
    "merges of nothing": '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]}}',
}


@pytest.mark.parametrize("name", BROKEN_TOKENIZERS)
def test_a_tokenizer_that_makes_no_sense_breaks_the_model_and_nothing_else(tmp_path, name):
    folder = make(tmp_path)
    (folder / "tokenizer.json").write_text(BROKEN_TOKENIZERS[name])
    with pytest.raises(ModelBroken):
        ChatTokenizer(folder)


SETTINGS = {
    "ends that are no ids": ("generation_config.json", '{"eos_token_id": [-1, 1e3, true, "x", 7]}'),
    "a deep file": ("generation_config.json", "[" * 99_999),
    "a list": ("generation_config.json", "[1]"),
    "temperatures that are no numbers": (
        "generation_config.json",
        '{"temperature": NaN, "top_k": Infinity, "top_p": -1, "eos_token_id": 7}',
    ),
    "a vocabulary below nothing": ("config.json", '{"model_type": "qwen3", "vocab_size": -5}'),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_make_no_sense_are_refused_or_as_if_not_there(tmp_path, name):
    folder = make(tmp_path)
    file, text = SETTINGS[name]
    (folder / file).write_text(text)
    try:
        tokenizer = ChatTokenizer(folder)
    except ModelBroken:
        return
    assert tokenizer.recommended == {}
    assert tokenizer.vocabulary > 0
    assert all(type(token) is int and 0 <= token < 1 << 32 for token in tokenizer.end_tokens)


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "much"),
        ("{{ 'x' * 10 ** 10 }}", "much"),
        ("{{ '%9999999999d' % 1 }}", "pads"),
    ],
)
def test_a_template_that_never_ends_refuses_the_chat_and_the_next_model_works(
    tmp_path, template, error
):
    hostile = ChatTokenizer(make(tmp_path / "hostile", chat_template=template))
    with pytest.raises(InvalidRequest, match=error):
        hostile.prompt(USER)
    assert ChatTokenizer(make(tmp_path / "honest")).prompt(USER)


def test_ids_that_no_tokenizer_knows_are_no_text(tmp_path):
    tokenizer = ChatTokenizer(make(tmp_path))
    assert tokenizer.decode([65, 1 << 31, 66]) == tokenizer.decode([65, 66])
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.add((1 << 32) - 1) == ""
    assert detokenizer.add(65) == tokenizer.decode([65])


def watch(monkeypatch: pytest.MonkeyPatch, tokenizer: ChatTokenizer, method: str) -> list[bool]:
    """Whether each call of this method was in the event loop's thread."""
    here: list[bool] = []
    inner = getattr(tokenizer, method)

    def outer(given: object) -> object:
        here.append(threading.current_thread() is threading.main_thread())
        return inner(given)

    monkeypatch.setattr(tokenizer, method, outer)
    return here


async def test_what_else_a_machine_does_is_not_held_against_a_tokenizer(tmp_path, monkeypatch):
    inner = ChatTokenizer.encode

    def held_up(self: ChatTokenizer, text: str) -> tuple[int, ...]:
        time.sleep(0.2)  # as by others who want the processor
        return inner(self, text)

    monkeypatch.setattr("parallax.scheduler.text.tokenizer._PROBED", "ab")
    monkeypatch.setattr(ChatTokenizer, "encode", held_up)
    tokenizer, tokenizers = ChatTokenizer(make(tmp_path)), Tokenizers()
    here = watch(monkeypatch, tokenizer, "render")
    for _ in range(3):
        assert await tokenizers.prompt(tokenizer, USER)
    tokenizers.close()
    assert here == [False, False, True]


async def test_a_chat_is_done_in_the_loop_only_after_others_were_quick(tmp_path, monkeypatch):
    tokenizer, tokenizers = ChatTokenizer(make(tmp_path)), Tokenizers()
    here = watch(monkeypatch, tokenizer, "render")
    for _ in range(4):
        assert await tokenizers.prompt(tokenizer, USER)
    assert here == [False, False, True, True]
    monkeypatch.setattr("parallax.scheduler.text.tokenizer.SLOW_S", 0.0)
    monkeypatch.setattr("parallax.scheduler.text.tokenizer.SLOW_CHARACTER_S", 0.0)
    for _ in range(3):
        assert await tokenizers.prompt(tokenizer, USER)
    tokenizers.close()
    assert here[4:] == [True, False, False]


async def test_a_chat_of_many_messages_is_done_in_a_thread_however_short_they_are(
    tmp_path, monkeypatch
):
    tokenizer, tokenizers = ChatTokenizer(make(tmp_path)), Tokenizers()
    here = watch(monkeypatch, tokenizer, "render")
    for chat in (USER, USER, USER, [{"role": "user", "content": "a"}] * 99):
        assert await tokenizers.prompt(tokenizer, chat)
    tokenizers.close()
    assert here == [False, False, True, False]


def test_who_is_refused_for_too_much_work_is_told_to_send_less(tmp_path):
    template = "{% for i in range(99999) %}{% for j in range(9) %}{% endfor %}{% endfor %}"
    tokenizer = ChatTokenizer(make(tmp_path, chat_template=template))
    with pytest.raises(InvalidRequest, match="too much work.*Send fewer or shorter messages"):
        tokenizer.render(USER)


def make_backtracking(folder: Path, most: int) -> Path:
    path = make(folder) / "tokenizer.json"
    settings = json.loads(path.read_text())
    pattern = {"Regex": f"(?:q|qq){{1,{most}}}$"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    both = [split, settings["pre_tokenizer"]]
    settings["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": both}
    path.write_text(json.dumps(settings))
    return folder


async def test_a_tokenizer_whose_pattern_backtracks_never_holds_the_loop(tmp_path, monkeypatch):
    tokenizer, tokenizers = ChatTokenizer(make_backtracking(tmp_path, 13)), Tokenizers()
    here = watch(monkeypatch, tokenizer, "encode")
    for _ in range(4):
        assert await tokenizers.prompt(tokenizer, USER)
    tokenizers.close()
    assert here == [False] * 4


def test_a_tokenizer_that_takes_absurdly_long_for_a_line_is_broken(tmp_path):
    with pytest.raises(ModelBroken, match="s to read"):
        ChatTokenizer(make_backtracking(tmp_path, 18))


async def test_texts_that_take_long_hold_up_no_other_model(tmp_path):
    slow, tokenizers = ChatTokenizer(make_backtracking(tmp_path / "slow", 13)), Tokenizers()
    long = [{"role": "user", "content": "q" * 6000 + "a"}]
    held = [asyncio.create_task(tokenizers.prompt(slow, long)) for _ in range(2)]
    await asyncio.sleep(0)  # both are handed to threads
    served = ServedModel("tiny", make(tmp_path / "quick"), 4096, 0)
    assert await tokenizers.prompt(await tokenizers.of(served), USER)
    assert not any(task.done() for task in held)
    await asyncio.gather(*held)
    tokenizers.close()


async def test_a_short_chat_that_becomes_a_long_text_is_encoded_in_a_thread(tmp_path, monkeypatch):
    template = "{{ 'x' * 20000 if 'long' in messages[0].content }}{{ messages[0].content }}"
    tokenizer = ChatTokenizer(make(tmp_path, chat_template=template))
    tokenizers, here = Tokenizers(), watch(monkeypatch, tokenizer, "encode")
    for word in ("a", "b", "c", "long"):
        assert await tokenizers.prompt(tokenizer, [{"role": "user", "content": word}])
    tokenizers.close()
    assert here == [False, False, True, False]


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", "{% if %}"])
async def test_a_template_is_compiled_once_and_in_a_thread(tmp_path, monkeypatch, template):
    threads = []
    compiled = CountedEnvironment.compile

    def outer(self: CountedEnvironment, source: str, *rest: object) -> object:
        threads.append(threading.current_thread())
        return compiled(self, source, *rest)

    monkeypatch.setattr(CountedEnvironment, "compile", outer)
    tokenizers, folder = Tokenizers(), make(tmp_path / "model", chat_template=template)
    tokenizer = await tokenizers.of(ServedModel("tiny", folder, 4096, 0))
    for _ in range(3):
        with contextlib.suppress(ModelBroken):
            await tokenizers.prompt(tokenizer, USER)
    tokenizers.close()
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()
