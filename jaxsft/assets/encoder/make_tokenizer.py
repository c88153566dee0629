"""Makes the tokenizer in this folder: 1,024 word pieces of the text that the project ships, lower-cased as BERT's are.

    python jaxsft/assets/encoder/make_tokenizer.py --out runs/encoder_tokenizer
    cp runs/encoder_tokenizer/* jaxsft/assets/encoder/

Its trainer breaks ties by chance, so another run may choose a few other pieces.
"""

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ASSETS = Path(__file__).parents[1]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
NAMED = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))


def main(out: str) -> None:
    files = [ASSETS / "text" / "notes.jsonl", ASSETS / "quickstart" / "train.jsonl"]
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=1024, special_tokens=SPECIAL, show_progress=False)
    core.train_from_iterator((text for row in rows for text in row.values()), trainer)
    core.decoder = decoders.WordPiece()
    core.post_processor = processors.BertProcessing(
        ("[SEP]", SPECIAL.index("[SEP]")), ("[CLS]", SPECIAL.index("[CLS]"))
    )
    PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=128, **NAMED).save_pretrained(out)
    core.save(f"{out}/tokenizer.json", pretty=False)  # again: indented, it is twice the size
    file = Path(out) / "tokenizer_config.json"
    # Transformers 5 writes the class's new name, which 4 does not know; both read the old one.
    settings = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", default="runs/encoder_tokenizer", help="the folder to write")
    main(parser.parse_args().out)
