"""GenEval's vocabulary: its six tags, 80 object classes, ten colours and four relations.

The classes are COCO's in COCO's order, three of them renamed. A detector's labels are matched by their index here,
never by name. Source: github.com/djghosh13/geneval, evaluation/object_names.txt and the prompts (MIT).
"""

from __future__ import annotations

from typing import Literal, get_args

Tag = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
Color = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
Relation = Literal["left of", "right of", "above", "below"]

TAGS: tuple[Tag, ...] = get_args(Tag)
COLORS: tuple[Color, ...] = get_args(Color)

_CLASSES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag,
tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse,
tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
teddy bear, hair drier, toothbrush
"""

CLASSES = tuple(name.strip() for name in _CLASSES.split(","))
