"""Makes the tokenizer in this folder: one token a character, 0 to 9 , : and =.

python jaxsft/assets/digits/make_characters.py --out runs/digits_tokenizer
cp runs/digits_tokenizer/* jaxsft/assets/digits/
"""

import argparse
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<end>", "<unk>"]
CHARACTERS = "0123456789,:="
# The question is what stands before "=", the answer what stands behind it.
TEMPLATE = """\
{%- for message in messages %}
{{- message['content'] + ('<end>' if message['role'] == 'assistant' else '=') }}
{%- endfor %}"""


def main(out: str) -> None:
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    named = dict(zip(("pad_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, **named)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(out)
    core.add_special_tokens(SPECIAL)
    core.save(f"{out}/tokenizer.json", pretty=False)  # again: indented, it is twice the size
    file = Path(out) / "tokenizer_config.json"
    # Transformers 5 writes the class's new name, which 4 does not know; both read the old one.
    settings = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", default="runs/digits_tokenizer", help="the folder to write")
    main(parser.parse_args().out)
