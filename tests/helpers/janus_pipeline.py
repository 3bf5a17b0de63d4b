"""transformers' any-to-any pipeline around a Janus folder, also where torchvision is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import AnyToAnyPipeline, JanusForConditionalGeneration, JanusProcessor, pipeline
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.utils import is_torchvision_available


class ChannelsFirst(JanusImageProcessorPil):
    """transformers' Janus processor without torchvision, with the channels moved to where it expects them.

    The pipeline passes `[height, width, channels]`, which this processor refuses.
    """

    def postprocess(self, images, **kwargs):
        return super().postprocess([image.permute(2, 0, 1) for image in images], **kwargs)


@contextmanager
def janus_pipeline(folder: Path) -> Iterator[AnyToAnyPipeline]:
    """The pipeline of a checkpoint folder, which returns images.

    The pipeline requires torchvision, and no build of that runs beside the CPU build of torch that constraints.txt
    pins: there, that check is replaced. transformers' image processor cannot return a Janus image, with torchvision or
    without (`test_pipeline.py`), and is replaced too. The rest is transformers' own.
    """
    model = JanusForConditionalGeneration.from_pretrained(folder).eval()
    processor = JanusProcessor.from_pretrained(folder)
    processor.image_processor = ChannelsFirst()
    with pytest.MonkeyPatch.context() as patch:
        if not is_torchvision_available():
            patch.setattr("transformers.pipelines.any_to_any.requires_backends", lambda *args: None)
        yield pipeline("any-to-any", model=model, processor=processor)
