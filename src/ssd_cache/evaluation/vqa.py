"""Models that answer yes/no questions about an image: BLIP, tuned for VQA, and any chat model of images and text.

They replace the mPLUG of DPG-Bench's official script, so scores differ from papers'.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BlipForQuestionAnswering,
    BlipProcessor,
)

from ssd_cache.budget import check_count
from ssd_cache.evaluation.judge_models import load_judge
from ssd_cache.io.showing import ReadableError, first_line

MAX_ANSWER_TOKENS = 10
"""Maximum length of BLIP's answer, the same as for mPLUG in the official script. "yes" is one token."""

FORMS = (str.lower, str.capitalize, str.upper)
"""Spellings of yes and no that a chat model's next token may take, each with and without a blank before it."""


class VQAModel(ABC):
    """Answers questions about an image with yes (True) or no (False).

    Attributes:
        name: name stored in the results; two models with the same name must give the same answers.
    """

    name: str

    @abstractmethod
    def answers(self, image: Image.Image, questions: Sequence[str]) -> list[bool]:
        """Whether the answer to each question is yes."""


class BlipVQA(VQAModel):
    """BLIP for VQA, such as Salesforce/blip-vqa-capfilt-large: yes if its generated answer, lower-cased, is "yes".

    A batch contains only questions with the same number of tokens. In transformers, BLIP's answer decoder attends to
    padding, so with mixed lengths an answer would depend on the other questions of its batch.
    """

    def __init__(self, model: BlipForQuestionAnswering, processor: BlipProcessor, name: str, batch_size: int = 8):
        self.model, self.processor, self.name, self.batch_size = model, processor, name, batch_size

    def answers(self, image: Image.Image, questions: Sequence[str]) -> list[bool]:
        return [text == "yes" for text in self.texts(image, questions)]

    @torch.inference_mode()
    def texts(self, image: Image.Image, questions: Sequence[str]) -> list[str]:
        """The generated answer to each question, stripped and lower-cased."""
        pixels = self.processor.image_processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.model.device, self.model.dtype)  # [1, 3, height, width]
        ids = [self.processor.tokenizer(question)["input_ids"] for question in questions]
        texts = [""] * len(questions)
        for length in sorted(set(map(len, ids))):
            rows = [row for row, tokens in enumerate(ids) if len(tokens) == length]
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                input_ids = torch.tensor([ids[row] for row in batch], device=self.model.device)  # [batch, tokens]
                output = self.model.generate(
                    input_ids=input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    pixel_values=pixels.expand(len(batch), -1, -1, -1),
                    max_new_tokens=MAX_ANSWER_TOKENS,
                    do_sample=False,
                )
                for row, text in zip(batch, self.processor.batch_decode(output, skip_special_tokens=True), strict=True):
                    texts[row] = text.strip().lower()
        return texts


class ChatVQA(VQAModel):
    """Any image-text chat model of transformers: yes if its next token is more likely a yes than a no.

    The prompt is "{question} Answer with yes or no.". The probabilities of all one-token spellings of yes are summed
    and compared with those of no. No free text is parsed. Processors of some families (with video) need torchvision.
    """

    def __init__(self, model: Any, processor: Any, name: str, batch_size: int = 8):
        if not getattr(processor, "chat_template", None) or not hasattr(processor, "image_processor"):
            raise ReadableError(f"{name} has no chat template, or no image processor; give a chat model for images")
        self.model, self.processor, self.name, self.batch_size = model, processor, name, batch_size
        self.yes_ids, self.no_ids = (self._token_ids(word) for word in ("yes", "no"))

    def answers(self, image: Image.Image, questions: Sequence[str]) -> list[bool]:
        return [yes > no for yes, no in self.log_probabilities(image, questions)]

    def log_probabilities(self, image: Image.Image, questions: Sequence[str]) -> list[tuple[float, float]]:
        """Log-probabilities (yes, no) of the next token for each question, each summed over its spellings."""
        pairs: list[tuple[float, float]] = []
        for logits in self._next_token(image, [f"{question} Answer with yes or no." for question in questions]):
            yes, no = (logits[:, ids].logsumexp(-1).tolist() for ids in (self.yes_ids, self.no_ids))
            pairs += zip(yes, no, strict=True)
        return pairs

    def probabilities(self, image: Image.Image, texts: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
        """Probability of the answers to each text: the sum over the first tokens of their spellings."""
        log_probabilities = torch.cat(list(self._next_token(image, texts))).cpu()  # [texts, vocabulary]
        tokenizer = self.processor.tokenizer
        found = []
        for row, spellings in zip(log_probabilities, answers, strict=True):
            tokens = {tokenizer.encode(word, add_special_tokens=False)[0] for word in spellings}
            found.append(sum(row[token].exp().item() for token in sorted(tokens - {tokenizer.unk_token_id})))
        return found

    @torch.inference_mode()
    def _next_token(self, image: Image.Image, texts: Sequence[str]) -> Iterator[torch.Tensor]:
        """Log-probabilities of the token after each text, `[batch, vocabulary]`, batch by batch."""
        image = image.convert("RGB")
        for start in range(0, len(texts), self.batch_size):
            inputs = self.processor.apply_chat_template(
                [_chat(image, text) for text in texts[start : start + self.batch_size]],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, "padding_side": "left"},  # the last token is the last column
            ).to(self.model.device, self.model.dtype)
            output = self.model.generate(  # handles each family's positions, and keeps the logits of one token only
                **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            yield output.logits[0].float().log_softmax(-1)

    def _token_ids(self, word: str) -> list[int]:
        """Ids of the spellings of a word that are one token."""
        tokenizer = self.processor.tokenizer
        spellings = [blank + form(word) for blank in ("", " ") for form in FORMS]
        encoded = [tokenizer.encode(spelling, add_special_tokens=False) for spelling in spellings]
        ids = sorted({one[0] for one in encoded if len(one) == 1 and one[0] != tokenizer.unk_token_id})
        if not ids:
            raise ReadableError(f"{self.name} has no single token for {word!r}; give another chat model")
        return ids


def _chat(image: Image.Image, text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


def load_vqa(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    batch_size: int = 8,
) -> BlipVQA | ChatVQA:
    """Load the VQA model of a folder or a Hub id, as `BlipVQA` for BLIP and as `ChatVQA` for any other model.

    `batch_size` questions are answered at once.

    Raises:
        ValueError: the model is neither, some of its weights are missing, or it has no chat template.
        OSError: the model cannot be found.
    """
    check_count("batch_size", batch_size, 1)
    is_blip = AutoConfig.from_pretrained(source).model_type == "blip"
    model_class = BlipForQuestionAnswering if is_blip else AutoModelForImageTextToText
    try:
        model = load_judge(model_class, source, dtype=dtype, device=device)
    except ValueError as error:  # transformers has no image-text class for this model type
        raise ReadableError(first_line(error)) from error
    if is_blip:
        return BlipVQA(model, BlipProcessor.from_pretrained(source), str(source), batch_size)
    return ChatVQA(model, AutoProcessor.from_pretrained(source), str(source), batch_size)
