"""Writes the captions that `ssd-cache prepare` uses: 160 written by hand, the rest made from parts written by hand.

Captions name objects, counts, colours, positions, scenes, styles and text on signs. None is a prompt of GenEval or
DPG-Bench, and none has the form "a photo of a ..."; `tests/prompts/test_captions.py` checks both. Run it as
`python examples/write_captions.py > src/ssd_cache/prompts/captions.txt`.
"""

from __future__ import annotations

import random
from collections.abc import Callable

WRITTEN = """\
A lighthouse keeper climbing a spiral staircase with a lantern in his hand
My grandmother's kitchen table, set for breakfast, seen from above
Rain on the window of a night train, with blurred city lights outside
A fox crossing an empty motorway at four in the morning
Two old men playing chess under a plane tree while a dog sleeps at their feet
A child in yellow rubber boots jumping into a puddle
Steam rising from a bowl of noodles in a street market
An astronaut planting tomatoes in a greenhouse on Mars
The inside of a clockmaker's workshop, every wall covered with clocks
A heron standing so still that a dragonfly has landed on its beak
Laundry drying between two tall houses in Naples
A paper boat floating down a gutter full of autumn leaves
Someone reading a newspaper in a bathtub, only the hands and the paper visible
A ginger cat looking at its own reflection in a toaster
An empty swimming pool with cracked blue tiles and weeds growing through the bottom
The last slice of a chocolate cake on a plate with a fork
A mountain hut at dusk with one window lit
Six wild geese flying in a V over a frozen lake
A violin without strings hanging on a white wall
A red telephone box standing alone in a wheat field
A baker dusting flour over round loaves before dawn
A chameleon on a branch, one eye looking forward and one looking back
Fishing nets spread out on a harbour wall to dry
A greenhouse overgrown with ferns, sunlight falling through broken panes
A robot watering a single sunflower
The shadow of a bicycle on cobblestones in the late afternoon
A snow globe with a tiny city inside, held in two gloved hands
An octopus opening a jar
A marching band in the rain, tubas shining
A bookshop cat asleep on a pile of dictionaries
Tea being poured from a great height into a small glass
A crowded tram seen through a fogged-up window
A hot-air balloon shaped like a teapot drifting over vineyards
A potter's hands shaping wet clay on a wheel
An old typewriter with a half-finished letter in it
A herd of elephants walking in single file along a river at sunset
A knight in full armour waiting at a bus stop
The northern lights over a row of red wooden cabins
A jar of honey with a wooden dipper, backlit by the morning sun
A tortoise eating a strawberry
A woman in a green coat feeding pigeons in front of a cathedral
A desert road running straight to the horizon under a huge cloud
A ship in a bottle on a windowsill beside a real harbour view
Three generations of a family making dumplings around one table
A whale breaching beside a very small rowing boat
A moss-covered stone lion guarding a forgotten garden gate
A barber's chair in an empty room with peeling green paint
A hedgehog wearing a knitted hat, cartoon
An aerial view of terraced rice fields filled with water
A grand piano on a beach at low tide
A conductor seen from the orchestra, baton raised
Cherry blossom petals covering a parked black car
A cup of coffee whose foam shows a map of the world
A girl with a telescope on the roof of an apartment building
A wooden toy train crossing a bridge made of books
A lizard sunning itself on a warm brick
A market stall with pyramids of oranges, lemons and limes
An igloo with warm light glowing through the ice blocks
A crow carrying a shiny key in its beak
A dentist's waiting room painted as if by Edward Hopper
Ice hockey on a frozen village pond, painted in the manner of an old Flemish master
A neon diner sign reflected in a wet parking lot
A pair of worn ballet shoes on a wooden floor
A flying carpet over the rooftops of Istanbul at night
A beekeeper lifting a frame out of a hive
A submarine surfacing between icebergs
A library so tall that the upper shelves disappear in fog
A stained glass window showing a sailing ship in a storm
Mushrooms growing in a ring on a misty lawn
A dog with its head out of a car window, ears flying
A clay pot with a cactus that has one pink flower
A blacksmith striking a glowing horseshoe, sparks everywhere
A steaming manhole on a winter night in New York, a yellow taxi passing
A moth circling a bare light bulb
The skeleton of a dinosaur in a museum hall, visitors tiny below it
A carousel horse with flaking paint, close up
A giraffe looking in through a second-floor window
A glass of water with a slice of lemon on a hospital tray
A stone bridge over a stream, half of it in sunlight
A surfer walking home barefoot at dusk, board under one arm
A tailor's dummy wearing an unfinished velvet jacket
A penguin delivering a letter
Baskets of spices in every shade of red, orange and brown
An abandoned amusement park with a Ferris wheel in the fog
A polar bear on a melting ice floe, seen from a helicopter
A single red apple among dozens of green ones
A windmill whose sails are made of patchwork quilts
A goldfish in a plastic bag on the passenger seat of a car
A tiny dragon asleep in a teacup
A man carrying a ladder through a revolving door
A field of lavender with a stone farmhouse in the distance
A street musician playing the accordion to an audience of one cat
A vending machine in the middle of a snowy forest, its light the only light
An X-ray of a suitcase with a saxophone in it
A garden gnome holding a fishing rod over a bird bath
A cyclist with a cello on her back
Sheep blocking a narrow lane in front of a post van
Pixel art of a castle on a floating island
A blueprint of a treehouse with handwritten notes
A satellite image of a river delta that looks like a tree
A bowl of cherries next to a bowl of stones
A spider's web covered in dew, with the sun behind it
A moonlit graveyard with one fresh bunch of flowers
A mountaineer boiling snow on a small stove inside a tent
A queue of people with umbrellas outside a tiny cinema
A parrot on the shoulder of a statue
The view from the back seat of a motorcycle on a coastal road
A doll's house with the front wall open, every room furnished
A farmer and his reflection in a flooded field
A camel drinking from a swimming pool
An origami crane standing on a real crane's feather
A plate of sushi arranged like a smiling face
A sailor mending a torn sail with a large needle
An underground station with green tiles and no passengers
A cat and a goldfish looking at each other through the bowl
A wooden spoon standing upright in a pot of thick porridge
A tunnel of wisteria with a child running through it
A grandfather clock lying on its side in long grass
A seal balancing a striped ball on its nose
A kitchen drawer full of keys
A rainbow ending in a car park
A scarecrow in a tuxedo
A lantern festival on a river, hundreds of small lights drifting
An umbrella turned inside out by the wind
A mouse sitting inside a hollowed-out loaf of bread
A girl blowing out seven candles on a birthday cake
A rusty anchor half buried in the sand
A pianist's hands seen from directly above
A woodpecker on a telegraph pole
A row of beach huts, each painted another colour
A firefighter drinking coffee in front of a fire engine
A tree growing through the roof of an old bus
A wedding cake in the shape of a cathedral
A photograph album open at a page with one picture missing
A penguin colony from above, like pepper on a white cloth
A sleeping baby with a toy rabbit in the crook of its arm
A stack of pancakes with butter melting on top
A cobbler's window with one pair of bright red boots
A mirror leaning against a birch tree in the woods
A bus driver waving at a lollipop lady
A rowing team carrying its boat on their shoulders
The moon seen through a hole in a barn roof
A glassblower with a glowing bubble at the end of the pipe
A boy whispering something into the ear of a horse
A cloud shaped like a sleeping dog
Twelve eggs in a carton, one of them blue
A canal boat covered with flower pots
A chess board on which all the pieces are salt and pepper shakers
An escalator covered with ivy
A cook in a tall white hat tasting soup with his eyes closed
An elderly couple dancing in their living room
A waterfall that freezes halfway down
A pencil drawing of a hand drawing a pencil
A tiger swimming with only its head above the water
A painter on a scaffold finishing an eye as big as herself
A kite caught in a bare tree
A subway map embroidered on a tablecloth
Two snails racing on a garden ruler
An elderly beagle in a bow tie, posing for its passport
A letter box overflowing with yellow leaves
"""
"""Captions written one by one."""

THINGS = """\
brass teapot|leather suitcase|basket of pears|glass jar of buttons|pocket watch|wooden rocking horse|loaf of rye bread
cast-iron pan|ceramic owl|straw hat|accordion|bicycle pump|sewing machine|alarm clock|pair of binoculars|rubber duck
stack of postcards|potted fern|fountain pen|harmonica|wool blanket|pineapple|porcelain bowl|oil lamp|pair of skates
tin robot|ship's bell|bunch of radishes|ukulele|enamel jug|magnifying glass|globe|birdcage|wicker chair|toolbox
kite|typewriter|chess clock|snow shovel|beehive|folding fan|gramophone|watering can|hammock|marble bust|compass
slice of watermelon|cuckoo clock|crystal vase|paint box|pumpkin|roller skate|lobster pot|music box|hourglass"""
SURFACES = """\
on a marble counter|on a weathered dock|on a velvet cushion|on a concrete floor|on a checked picnic blanket
on a stone windowsill|on a stack of hay|on a steel workbench|in tall grass|on wet sand|on a mossy log|in fresh snow
on a crowded bookshelf|on a park bench|on the bonnet of an old car|on a gravel path|at the bottom of a staircase"""
LIGHTS = """\
in soft morning light|lit from one side|under a single spotlight|at golden hour|on an overcast day|by candlelight
with long shadows|in harsh noon sun|with a blurred background|seen from directly above|seen from very close"""
BACKDROPS = """\
a plain grey wall|a pale pink background|a dark blue curtain|a wall of white tiles|a sheet of brown paper
a black background|faded floral wallpaper"""
COLOURS = """\
crimson|scarlet|mustard yellow|lemon yellow|navy blue|sky blue|turquoise|emerald green|olive green|lilac|purple|ivory
jet black|silver|copper|salmon pink|burnt orange|chocolate brown|pearl white|lime green|red|orange|teal|golden"""
CLOTHES = """\
raincoat|umbrella|scarf|armchair|front door|rowing boat|teapot|backpack|bicycle|letterbox|lampshade|bowl|kimono
camper van|candle|balloon|suitcase|pillow|wheelbarrow|motor scooter|tent|kettle|ribbon|picture frame|piano"""
ANIMALS = """\
tabby cat|greyhound|barn owl|goose|pony|squirrel|toad|peacock|lamb|badger|raccoon|tortoise|rooster|otter|goat|parrot
dachshund|hare|swan|donkey|monkey|pigeon|hedgehog|koala"""
LANDMARKS = """\
garden bench|piano|bookcase|kitchen table|stone well|red post box|stepladder|wheelbarrow|haystack|fountain|bathtub
wooden fence|parked van|sofa|fireplace|market stall|oak tree|tractor|phone booth|grandfather clock|statue|fridge"""
SIDES = "to the left of|to the right of|behind|in front of|beside|right next to|some way behind"
GROUPS = """\
hens:pecking at grain in a farmyard|lying in the shade of a cart;lanterns:hanging from a rope|floating on a dark pond
rowing boats:moored at a jetty|upside down on a beach;pencils:in a mug|lined up on squared paper
penguins:on a rocky shore|waddling in a line;croissants:on a baking tray|in a paper bag
cyclists:on a mountain pass|waiting at a red light;apples:on a chopping board|floating in a bucket
kittens:in a laundry basket|on a staircase;deck chairs:facing the sea|on a wet lawn
candles:on a piano|in the neck of wine bottles;dolphins:leaping in front of a ferry|under clear water
chefs:in a narrow kitchen|on a smoke break;flamingos:in a salt lake|standing on one leg each
keys:on a brass ring|on a stone step;violins:in a shop window|in open cases
suitcases:on a station platform|on the roof of a car;snails:on a cabbage leaf|on a garden wall
umbrellas:drying in a hallway|seen from a balcony;cacti:on a sunny windowsill|in a glasshouse
camels:crossing a dune|kneeling by a well;teacups:on a lace tablecloth|stacked in a sink
tractors:in a muddy field|at a village fair;dice:on green felt|in an open palm
drummers:on a street corner|under a bridge;donuts:in a pink box|on a wire rack"""
NUMBERS = "two|three|four|five|six|seven|eight"
PLACES = """\
A fishing village|A mountain pass|A cobbled square|An overgrown railway line|A harbour|A canal with houseboats
A pine forest|A vineyard|An oasis|A salt flat|A suburban street|A rooftop garden|A ferry terminal|A monastery courtyard
A rocky coast|A meadow full of poppies|A gas station on a highway|A night market|A village football ground|A quarry lake
A bamboo grove|An allotment garden|A container port|A ski slope|A botanical garden"""
TIMES = """\
at first light|just after rain|in thick fog|on a windy afternoon|during a thunderstorm|at noon in midsummer
in late autumn|under a full moon|at blue hour|after heavy snowfall|on a hazy morning|seconds before sunset"""
DETAILS = """\
with a single figure in a long coat|with smoke rising from a chimney|with a dog running away from the viewer
with a row of empty benches|with two children flying a kite|with birds circling above
with an old truck parked at the edge|with laundry on a line|with a cyclist passing by|and not a soul in sight
with a thin crescent moon|with a narrow path"""
STYLES = """\
Watercolour of|Charcoal sketch of|Linocut of|Oil painting of|Ukiyo-e woodblock print of|Pixel art of
Art deco poster of|Low-poly 3D render of|Ink drawing of|Stop-motion still of|Embroidery of|Mosaic of
Vintage travel poster of|Comic panel of|Children's book illustration of|Paper cut-out of|Chalk drawing of
Isometric illustration of|Cyanotype of|Claymation of"""
SUBJECTS = """\
a ferry arriving at a small island|an old woman knitting by a stove|a street in Lisbon|a fox among birch trees
a jazz trio|a steam locomotive in a valley|a bowl of figs|a diver with a brass helmet|a windmill and a canal
a cat on a tin roof|an observatory on a hill|a beetle with iridescent wings|a tea house by a lake
a boxer tying his gloves|a market in Marrakesh|a bear catching salmon|a greenhouse in winter
a tightrope walker|a lighthouse in a storm
an owl with a letter|a robot sweeping leaves|a bridge in the rain|a shepherd with his flock|a city of towers at night"""
SIGNS = """\
A hand-painted board outside {}:a farm shop|a village bakery|a bicycle workshop:FRESH EGGS|OPEN|BACK IN 5 MINUTES|CLOSED
A neon sign above {}:a corner bar|a record shop|an old motel:OPEN LATE|VINYL|ROOMS|JAZZ TONIGHT
A cardboard sign held by {}:a hitchhiker at the roadside|a boy at a lemonade stand|a robot:NORTH|LEMONADE 50c|HELLO
A banner across {}:a village street|a finish line|a school hall:WELCOME HOME|FINISH|SPRING FAIR|WELL DONE
Chalk letters on {}:a café blackboard|a garden wall|the pavement:SOUP OF THE DAY|BE KIND|HAPPY BIRTHDAY ANNA
A brass plate on {}:a heavy oak door|a sundial|a park bench:LIBRARY|TIME FLIES|FOR MARGARET|DOCTOR
An enamel sign nailed to {}:a wooden gate|a tree trunk|a garden shed:BEWARE OF THE GOOSE|PRIVATE|HONEY|KEEP OUT
Large white letters on the side of {}:a blue delivery van|a barn|a cargo ship:FLOWERS|MILK|AURORA|EXPRESS"""

REQUESTS = "I would like to see|Show me|Draw|Please paint|An image of|A picture that shows|Imagine|Make a picture of"


def main() -> None:
    """Print the captions, one a line."""
    print("\n".join(captions()))


def captions(seed: int = 0) -> list[str]:
    """All 600 captions, different ones, in an order that mixes the kinds; the same seed gives the same list."""
    rng = random.Random(f"captions-{seed}")
    found = dict.fromkeys(WRITTEN.splitlines())
    for make, number in KINDS.items():
        wanted = len(found) + number
        while len(found) < wanted:
            found.setdefault(_asked(make(rng), rng))
    mixed = list(found)
    rng.shuffle(mixed)
    return mixed


def _asked(caption: str, rng: random.Random) -> str:
    """The caption, or one in four times the same as a request."""
    if not caption.startswith(("A ", "An ")) or rng.random() < 0.75:
        return caption
    return f"{rng.choice(_parts(REQUESTS))} {caption[0].lower()}{caption[1:]}"


def article(phrase: str) -> str:
    """The phrase with "a" or "an"."""
    starts_with_vowel = phrase[0] in "aeiou" and not phrase.startswith("uk")  # ukulele, ukiyo-e
    return f"{'an' if starts_with_vowel else 'a'} {phrase}"


def capital(text: str) -> str:
    """The text with a capital first letter."""
    return text[0].upper() + text[1:]


def _objects(rng: random.Random) -> str:
    thing, other = (article(name) for name in rng.sample(_parts(THINGS), 2))
    surface, light = rng.choice(_parts(SURFACES)), rng.choice(_parts(LIGHTS))
    forms = [
        f"{thing} {surface}, {light}",
        f"{thing} and {other} {surface}",
        f"close-up of {thing}, {light}",
        f"studio shot of {thing} against {rng.choice(_parts(BACKDROPS))}",
        f"still life with {thing} and {other}",
        f"someone has left {thing} {surface}",
        f"{thing} half hidden behind {other}",
    ]
    return capital(rng.choice(forms))


def _counts(rng: random.Random) -> str:
    name, places = rng.choice([group.split(":") for line in GROUPS.splitlines() for group in line.split(";")])
    number, place = rng.choice(_parts(NUMBERS)), rng.choice(places.split("|"))
    forms = [
        f"{number} {name} {place}",
        f"exactly {number} {name} {place}, {rng.choice(_parts(LIGHTS))}",
        f"a group of {number} {name} {place}",
        f"{number} {name} of different sizes {place}",
        f"a picture with {number} {name} {place} and nothing else",
    ]
    return capital(rng.choice(forms))


def _colours(rng: random.Random) -> str:
    first, second = rng.sample(_parts(COLOURS), 2)
    thing, other = rng.sample(_parts(CLOTHES), 2)
    animal = rng.choice(_parts(ANIMALS))
    forms = [
        f"{article(first)} {thing} next to {article(second)} {other}",
        f"{article(thing)} with {first} and {second} stripes",
        f"{article(first)} {thing}, everything else in the picture is {second}",
        f"{article(animal)} wearing {article(first)} ribbon in front of {article(second)} wall",
        f"the {other} is {first} and the {thing} is {second}",
        f"{article(first)} {thing} under {article(second)} sky",
        f"{first} {thing}, {second} {other}, plain white background",
    ]
    return capital(rng.choice(forms))


def _positions(rng: random.Random) -> str:
    animal, other = (article(name) for name in rng.sample(_parts(ANIMALS), 2))
    landmark, side = rng.choice(_parts(LANDMARKS)), rng.choice(_parts(SIDES))
    thing = article(rng.choice(_parts(THINGS)))
    forms = [
        f"{animal} {side} {article(landmark)}",
        f"{animal} standing between {article(landmark)} and {other}",
        f"on the left {animal}, on the right {other}",
        f"{animal} looking up at {thing} on a high shelf",
        f"{thing} lying {side} {article(landmark)}",
        f"{animal} in the foreground, {article(landmark)} far away in the background",
        f"{animal} in the lower corner of the picture, {other} in the upper one",
        f"{thing} and {animal}, with {article(landmark)} between them",
    ]
    return capital(rng.choice(forms))


def _scenes(rng: random.Random) -> str:
    place, time, detail = rng.choice(_parts(PLACES)), rng.choice(_parts(TIMES)), rng.choice(_parts(DETAILS))
    forms = [
        f"{place} {time}, {detail}",
        f"{place} {time}",
        f"wide view of {place[0].lower()}{place[1:]} {time}",
        f"{place} {detail}, {time}",
        f"film still: {place[0].lower()}{place[1:]} {time}, {detail}",
    ]
    return capital(rng.choice(forms))


def _styles(rng: random.Random) -> str:
    style, subject = rng.choice(_parts(STYLES)), rng.choice(_parts(SUBJECTS))
    colour = rng.choice(_parts(COLOURS))
    forms = [
        f"{style} {subject}",
        f"{style} {subject}, mostly in {colour}",
        f"{subject}, done as {article(style.removesuffix(' of').lower())}",
        f"{style} {subject}, with a lot of empty space around it",
    ]
    return capital(rng.choice(forms))


def _signs(rng: random.Random) -> str:
    sign, carriers, texts = rng.choice([line.split(":") for line in SIGNS.splitlines()])
    what, text = sign.format(rng.choice(carriers.split("|"))), rng.choice(texts.split("|"))
    verb = "read" if what.startswith(("Chalk", "Large")) else "reads"
    return rng.choice(
        [f'{what} {verb} "{text}"', f'{what}, with the words "{text}"', f'{what}: "{text}"'.replace("Large", "Big")]
    )


def _parts(text: str) -> list[str]:
    return text.replace("\n", "|").split("|")


KINDS: dict[Callable[[random.Random], str], int] = {
    **{_objects: 70, _counts: 75, _colours: 75, _positions: 80},
    **{_scenes: 70, _styles: 50, _signs: 20},
}
"""Captions of each kind that are made from parts; with those written by hand they are 600."""


if __name__ == "__main__":
    main()
