"""Token ids are those of tokenizer.json; EOS ids; chats in the words of a template."""

import json
import shutil

import pytest
from families import CONFIGS
from tokenizers import Tokenizer

from model import Decoder, encode_chats, load
from reward import InputError

TEXT = "Ann has 12 shells .\n\n1 shell isn't  345 ; How many now?"
CLASSES = [None, "GPT2Tokenizer", "Qwen2Tokenizer", "GPTNeoXTokenizer", "LlamaTokenizerFast"]
TURN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
CHAT = [("system", " Be brief. "), ("user", "1 + 1 <eos>?\n")]
PARTS = TURN.replace("{{ m['content'] }}", "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}")


def edit(file, **changes):
    """Change entries of a JSON file, or write one."""
    text = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(text | changes))


@pytest.fixture
def run(toy_run, tmp_path):
    """A copy of a checkpoint that may be changed."""
    return shutil.copytree(toy_run, tmp_path / "run")


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3", "opt"])
def test_ids_are_those_of_the_file_whatever_the_configs_say(family, name, toy_run, tmp_path):
    config = CONFIGS[family]()
    config.vocab_size = 600
    decoder = Decoder(config)
    decoder.files = load(toy_run, None, None).files
    decoder.save_pretrained(tmp_path)
    odd = {"clean_up_tokenization_spaces": True, "add_prefix_space": True, "chat_template": TURN}
    edit(tmp_path / "tokenizer_config.json", tokenizer_class=name, **odd)

    model = load(tmp_path, None, None)
    file = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rendered = file.encode(f"<user>{TEXT}<eos>").ids
    assert encode_chats(model.tokenizer, [[("user", TEXT)]]) == [rendered]
    file.encode_special_tokens = True
    ids = file.encode(TEXT + "<eos>").ids
    assert model.encode([TEXT + "<eos>"]) == [ids]
    assert model.tokenizer.decode(ids) == TEXT + "<eos>"
    model.save_pretrained(tmp_path / "saved")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "saved" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_code_of_a_checkpoint_does_not_run_and_nothing_is_asked(run, monkeypatch):
    code = {"AutoTokenizer": ["own.Own", None]}
    edit(run / "tokenizer_config.json", auto_map=code, tokenizer_class="Own")
    monkeypatch.setattr("builtins.input", lambda *text: pytest.fail("asked"))
    assert load(run, None, None).encode(["x"])
    (run / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="tokenizer"):
        load(run, None, None)


def test_a_vocabulary_larger_than_the_embedding_is_refused(toy_run, tmp_path):
    decoder = Decoder(CONFIGS["qwen2"]())
    decoder.files = load(toy_run, None, None).files
    decoder.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="tokenizer of 575 tokens, embedding of 97 rows"):
        load(tmp_path, None, None)


# ---- EOS -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [([5, 6], 7, [5, 6, 7]), (None, [7, 7], [7]), ([], None, [1]), (None, None, [1])],
    ids=str,
)
def test_eos_ids_of_both_configs_are_one_set_else_the_tokenizer_has_one(
    generation, config, expected, run
):
    edit(run / "generation_config.json", eos_token_id=generation)
    edit(run / "config.json", eos_token_id=config)
    decoder = load(run, None, None)
    assert decoder.eos_ids == expected
    decoder.save_pretrained(run / "again")
    assert load(run / "again", None, None).eos_ids == expected
    (run / "chat_template.jinja").write_text(TURN)  # the tokenizer's, too, where there are chats
    assert load(run, None, None).eos_ids == list(dict.fromkeys([*expected, 1]))


@pytest.mark.parametrize("ids", [600, -1, [1, 600], "1", {}, [None], 1.5, True], ids=str)
def test_eos_ids_that_are_no_ids_of_the_embedding_are_refused(ids, run):
    edit(run / "generation_config.json", eos_token_id=ids)
    with pytest.raises(InputError, match="end-of-sequence"):
        load(run, None, None)


# ---- chats ---------------------------------------------------------------------------------------


def chat_of(run, template):
    """The prompt of CHAT under a template, as text; the ids."""
    (run / "chat_template.jinja").write_text(template)
    model = load(run, None, None)
    (ids,) = encode_chats(model.tokenizer, [CHAT])
    return model.tokenizer.decode(ids), ids


@pytest.mark.parametrize("template", [TURN, PARTS], ids=["text", "parts"])
def test_a_chat_holds_its_texts_in_which_a_control_token_stays_text(template, run):
    text, ids = chat_of(run, template)
    assert text == "<system> Be brief. <eos><user>1 + 1 <eos>?\n<eos>"
    assert ids.count(1) == 2  # the template's own


def test_a_template_may_strip_its_texts_and_stand_in_chat_template_json(run):
    edit(run / "chat_template.json", chat_template=TURN.replace("'] }}<eos>", "'] | trim }}<eos>"))
    tokenizer = load(run, None, None).tokenizer
    (ids,) = encode_chats(tokenizer, [CHAT])
    assert tokenizer.decode(ids) == ("<system>Be brief.<eos><user>1 + 1 <eos>?<eos>")


@pytest.mark.parametrize(
    "template",
    [
        TURN.replace("{{ m['content'] }}", ""),
        TURN.replace("in messages", "in messages[1:]"),
        "{{ raise_exception('no system role') }}",
        "{% for",
    ],
)
def test_a_template_that_fails_or_leaves_out_a_text_is_refused(template, run):
    with pytest.raises(InputError, match="--prompt-style reft"):
        chat_of(run, template)


def test_a_template_with_a_switch_for_thoughts_opens_none(run):
    switch = TURN + "{% if enable_thinking is not false %}<think>{% endif %}"
    assert "<think>" not in chat_of(run, switch)[0]
