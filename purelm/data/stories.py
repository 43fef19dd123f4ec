"""The grammar of short children's stories, as plain data: what the default corpus is drawn from.

The notation is that of grammar.py: `[pick]` is drawn anew at each mention, `{variable.form}` once in a story. `ranked`
gives the value of rank r = 0, 1, ... the weight 1 / (r + 5), a Zipf law in Mandelbrot's form; `weighted` takes weights.
Five plots (a lost toy, an animal in trouble, a quarrel, something hard to learn, a surprise to cook) share openings,
endings and small words. What is drawn early (child, friend, grown-up, toy, color, place, trouble) comes back later
and decides words far away, so that a model has to copy and to agree, not only to count.
"""

from collections.abc import Mapping, Sequence

from purelm.data.grammar import Variable

Alternatives = list[tuple[float, str]]


def ranked(*texts: str) -> Alternatives:
    """Alternatives, the most frequent first, with weights 1 / (rank + 5)."""
    return [(1 / (rank + 5), text) for rank, text in enumerate(texts)]


def weighted(*pairs: tuple[float, str]) -> Alternatives:
    """Alternatives with weights written out."""
    return list(pairs)


def _values(*values: Mapping[str, str]) -> Variable:
    return Variable(values, [1 / (rank + 5) for rank in range(len(values))])


def _article(text: str) -> str:
    return f"an {text}" if text[0] in "aeiou" else f"a {text}"


def _things(*texts: str) -> Variable:
    return _values(*({"": text, "a": _article(text)} for text in texts))


# --- who, where, what

GIRL = {"": "girl", "he": "she", "him": "her", "his": "her", "He": "She", "His": "Her"}
BOY = {"": "boy", "he": "he", "him": "him", "his": "his", "He": "He", "His": "His"}

# Girls and boys by turns, the most frequent first.
NAMES = (
    "Lily", "Tom", "Mia", "Ben", "Emma", "Max", "Lucy", "Sam", "Anna", "Tim", "Sara", "Jack", "Ella", "Leo", "Daisy",
    "Finn", "Zoe", "Noah", "Molly", "Peter", "Ruby", "Oscar", "Nora", "Henry", "Grace", "Luke", "Clara", "Will",
    "Ivy", "Charlie", "Jane", "Theo", "Rosa", "Adam", "Hazel", "Felix",
)  # fmt: skip
_NAME_WEIGHTS = [1 / (rank // 2 + 5) for rank in range(len(NAMES))]
# The child's sex is drawn first: the name must agree with it. The friend is anybody else.
_NAMES_OF_GIRLS = [w if rank % 2 == 0 else 0 for rank, w in enumerate(_NAME_WEIGHTS)]
_NAMES_OF_BOYS = [w if rank % 2 == 1 else 0 for rank, w in enumerate(_NAME_WEIGHTS)]
_NAMES_OF_OTHERS = [
    [0 if rank == hero else w for rank, w in enumerate(_NAME_WEIGHTS)] for hero in range(len(NAMES))
]
_FRIENDS = tuple({**(GIRL, BOY)[r % 2], "kid": ("girl", "boy")[r % 2], "": name} for r, name in enumerate(NAMES))


def _grown_ups(*texts: str) -> Variable:
    """Women and men by turns."""
    return _values(*({**(GIRL, BOY)[rank % 2], "": text} for rank, text in enumerate(texts)))


def _places(*pairs: tuple[str, str]) -> Variable:
    """From (preposition, place): "at the park", "to the park"."""
    return _values(*({"": place, "at": f"{at} {place}", "to": f"to {place}"} for at, place in pairs))


def _records(forms: str, *rows: Sequence[str]) -> Variable:
    names = ["" if form == "-" else form for form in forms.split()]
    return _values(*(dict(zip(names, row, strict=True)) for row in rows))


VARIABLES = {
    "kid": Variable((GIRL, BOY), (5, 4)),
    "hero": Variable(tuple({"": name} for name in NAMES), (), "kid", (_NAMES_OF_GIRLS, _NAMES_OF_BOYS)),
    "friend": Variable(_FRIENDS, (), "hero", _NAMES_OF_OTHERS),
    "helper": _grown_ups(
        "mom", "dad", "grandma", "grandpa", "aunt", "uncle", "big sister", "big brother", "nanny", "teacher",
    ),
    "place": _places(
        ("at", "the park"), ("in", "the garden"), ("by", "the river"), ("in", "the forest"), ("at", "the beach"),
        ("on", "the hill"), ("at", "the farm"), ("by", "the lake"), ("in", "the meadow"), ("at", "the playground"),
        ("in", "the village"), ("by", "the pond"), ("in", "the orchard"), ("at", "the zoo"), ("by", "the old bridge"),
        ("in", "the valley"), ("at", "the market"), ("by", "the windmill"), ("at", "the castle"), ("in", "the woods"),
        ("at", "the station"), ("by", "the lighthouse"), ("on", "the island"), ("at", "the fair"),
    ),
    "object": _things(
        "ball", "doll", "kite", "toy car", "teddy bear", "drum", "hat", "pinwheel", "robot", "boat", "train", "puzzle",
        "whistle", "scarf", "bucket", "umbrella", "music box", "paper plane", "yo-yo", "lantern", "truck", "flute",
        "necklace", "ring", "marble", "spaceship", "crown", "bell", "wagon", "shovel", "feather", "blanket",
    ),
    "color": _things(
        "red", "blue", "yellow", "green", "pink", "purple", "orange", "white", "golden", "silver", "brown", "gray",
    ),
    "animal": _things(
        "rabbit", "puppy", "kitten", "squirrel", "duck", "mouse", "fox", "bear", "hedgehog", "lamb", "owl",
        "deer", "frog", "turtle", "goat", "pony", "beaver", "sparrow", "piglet", "swan", "donkey", "parrot", "goose",
        "otter",
    ),
    "pet": _records("-", *zip((
        "Coco", "Bella", "Buddy", "Fluffy", "Spot", "Pip", "Teddy", "Nutmeg", "Lucky", "Biscuit", "Pepper", "Snowball",
        "Honey", "Muffin", "Ginger", "Cloud", "Button", "Peanut", "Sunny", "Maple",
    ))),
    # An animal's trouble: what is wrong, what is done, and how it is afterwards.
    "trouble": _records(
        "- fix well",
        ("had hurt its leg", "put a soft bandage on its leg", "its leg did not hurt anymore"),
        ("had lost its mother", "looked for its mother until they found her", "it was safe with its mother"),
        ("was cold and wet", "dried it with a warm towel", "it was warm and dry again"),
        ("was very hungry", "gave it a bowl of good food", "it was full and sleepy"),
        ("was stuck in the mud", "pulled it out of the mud with a rope", "it was clean again"),
        ("had a thorn in its foot", "took the thorn out of its foot", "it could walk without pain"),
        ("was caught in a net", "cut the net with great care", "it was free to run again"),
        ("was too tired to walk", "let it sleep in a basket full of hay", "it was strong again"),
    ),
    # What happens to a toy in a quarrel, and how it is put right.
    "damage": _records(
        "- fix",
        ("fell into a puddle", "washed it in clean water"),
        ("broke in two", "fixed it with some glue"),
        ("flew over the wall", "climbed over the wall to get it back"),
        ("got very dirty", "cleaned it with an old cloth"),
        ("rolled into a hole", "got it out of the hole with a stick"),
        ("lost a small piece", "found the piece and put it back"),
        ("landed in a tree", "shook the tree until it came down"),
    ),
    # Something to learn: where, what is frightening, what goes wrong, what it looks like in the end.
    "skill": _records(
        "- ing at fear fail win",
        ("ride a bike", "riding a bike", "on the road", "falling off", "the bike tipped over",
         "rode all the way down the road"),
        ("swim", "swimming", "at the pool", "the deep water", "the water was too cold",
         "swam from one side to the other"),
        ("climb a tree", "climbing a tree", "by the big oak", "high places", "the branch was too far away",
         "climbed up to the highest branch"),
        ("skate", "skating", "on the frozen pond", "thin ice", "the ice was too slippery",
         "went around the pond three times"),
        ("sing on a stage", "singing on a stage", "at school", "all the people", "no sound came out",
         "sang the whole song without a mistake"),
        ("jump rope", "jumping rope", "in the yard", "looking silly", "the rope got caught",
         "jumped twenty times in a row"),
        ("fly a kite", "flying a kite", "on the hill", "the strong wind", "the kite came down at once",
         "kept the kite high up in the sky"),
        ("ride a horse", "riding a horse", "at the stable", "the tall horse", "the horse did not move at all",
         "rode around the whole field"),
        ("play the piano", "playing the piano", "in the music room", "wrong notes", "it did not sound right",
         "played the song from beginning to end"),
        ("throw a ball", "throwing a ball", "on the field", "missing it", "the ball went the wrong way",
         "threw the ball right into the basket"),
    ),
    # Something to cook, and what is missing for it.
    "food": _records(
        "- a missing none",
        ("apple pie", "an apple pie", "apples", "were no apples"),
        ("chocolate cake", "a chocolate cake", "chocolate", "was no chocolate"),
        ("vegetable soup", "a vegetable soup", "carrots", "were no carrots"),
        ("honey bread", "a honey bread", "honey", "was no honey"),
        ("pizza", "a pizza", "cheese", "was no cheese"),
        ("fruit salad", "a fruit salad", "grapes", "were no grapes"),
        ("blueberry tart", "a blueberry tart", "blueberries", "were no blueberries"),
        ("pumpkin pie", "a pumpkin pie", "pumpkins", "were no pumpkins"),
        ("omelet", "an omelet", "eggs", "were no eggs"),
        ("lemon cake", "a lemon cake", "lemons", "were no lemons"),
        ("tomato soup", "a tomato soup", "tomatoes", "were no tomatoes"),
        ("nut cake", "a nut cake", "nuts", "were no nuts"),
    ),
}  # fmt: skip

# --- small words, drawn anew each time

WORDS = {
    "trait": ranked("little", "kind", "happy", "clever", "brave", "shy", "quiet", "funny", "young", "smart",
                    "sweet", "bold", "wise", "busy", "neat", "polite", "proud", "strong", "nice", "calm"),
    "size": ranked("small", "big", "quiet", "pretty", "sleepy", "cozy", "faraway", "tidy", "sunny", "windy",
                   "busy", "snowy"),
    "town": ranked("village", "town", "city", "harbor", "valley", "street", "country", "forest"),
    "home": ranked("house", "cottage", "cabin", "castle", "hut", "tower", "tent", "mill"),
    "weather": ranked("sunny", "warm", "bright", "windy", "cool", "cloudy", "lovely", "quiet", "beautiful",
                      "fresh", "misty", "golden", "mild", "fine", "clear", "cold"),
    "weekday": ranked("Sunday", "Saturday", "Monday", "Friday", "Tuesday", "Wednesday", "Thursday"),
    "part": ranked("morning", "afternoon", "evening", "day"),
    "season": ranked("spring", "day", "week", "summer", "winter", "month", "autumn", "night"),
    "very": ranked("very", "so", "really", "quite", "truly", "rather", "a bit", "ever so"),
    "glad": ranked("happy", "glad", "proud", "excited", "pleased", "cheerful", "thrilled", "delighted",
                   "joyful", "merry", "lucky", "thankful", "content", "hopeful", "calm", "grateful",
                   "relieved", "peaceful", "fine", "brave"),
    "sad": ranked("sad", "worried", "upset", "unhappy", "scared", "gloomy", "nervous", "afraid",
                  "disappointed", "miserable", "angry", "frightened", "sorry", "shaken"),
    "kindly": ranked("softly", "kindly", "gently", "quietly", "with a smile", "in a warm voice", "sweetly",
                     "slowly", "at once", "after a while", "with a nod", "calmly", "in a low voice",
                     "politely", "quickly", "carefully", "in the end", "bravely", "shyly", "with a wink",
                     "warmly", "proudly", "once more", "with a laugh", "happily", "clearly"),
    "said": ranked("said", "answered", "whispered", "replied", "called", "laughed", "sighed", "murmured"),
    "hurry": ranked("ran", "walked", "hurried", "rushed", "went", "skipped", "raced", "strolled", "marched",
                    "hopped", "jogged", "tiptoed"),
    "act": ranked("ran", "jumped", "laughed", "danced", "sang", "hopped", "clapped", "skipped", "played",
                  "whistled", "giggled", "twirled", "cheered", "hummed", "waved", "spun", "raced", "marched",
                  "smiled", "climbed", "rolled", "splashed", "shouted", "swung", "talked", "rested",
                  "bounced", "wiggled", "tumbled", "stretched", "chuckled", "wandered", "swayed", "grinned",
                  "peeked", "yawned"),
    "sky": ranked("The sun was shining", "The birds were singing", "The sky was blue", "The wind was soft",
                  "The flowers smelled sweet", "There were no clouds", "Bees hummed in the air",
                  "There was a rainbow", "The leaves were dancing", "A cool wind blew", "The grass was wet",
                  "The air was fresh", "Bells rang far away", "Snow lay on the ground"),
    "until": ranked("the sun went down", "dinner was ready", "the stars came out", "it got dark",
                    "they were tired", "the moon was up", "it started to rain", "the bells rang",
                    "the owls woke up", "the lamps were lit", "the wind stopped", "it was late",
                    "supper time", "the fire went out", "the music stopped", "bedtime"),
    "treat": ranked("cookies", "ice cream", "cake", "pancakes", "muffins", "chocolate", "waffles", "pudding",
                    "buns", "jelly", "pie", "candy", "honey", "jam", "donuts", "cupcakes"),
    "where": ranked("under a tree", "in the shade", "on the porch", "by the fire", "in the sun",
                    "on a blanket", "on a bench", "by the window", "on the grass", "on the steps",
                    "in the kitchen", "in a tent", "by the lamp", "on a log", "in the yard", "at home",
                    "outside", "on the roof", "by the door", "under the stars"),
    "prep": ranked("behind", "next to", "near", "beside", "in front of", "by", "under", "close to"),
    "looks": ranked("old", "big", "little", "tall", "green", "white", "gray", "crooked", "lonely", "wide",
                    "huge", "yellow", "round", "dusty", "red", "brown", "long", "broad", "pink", "black",
                    "muddy", "narrow", "pretty", "mossy"),
    "mark": ranked("tree", "fence", "bench", "wall", "gate", "rock", "barn", "well", "bush", "shed", "statue",
                   "fountain", "hedge", "cart", "ladder", "tower", "tent", "stump", "swing", "boat", "log",
                   "house", "bridge", "lamp", "slide", "door", "wagon", "roof", "mailbox", "sign", "chair",
                   "table", "barrel", "haystack", "kennel", "windmill"),
    "spot": weighted((1, "[prep] the [looks] [mark]")),
    "number": ranked("two", "three", "four", "five", "six", "seven", "some", "many", "eight", "nine", "ten",
                     "a few"),
    "creatures": ranked("ducks", "butterflies", "birds", "bees", "frogs", "snails", "turtles", "ants", "owls",
                        "mice", "crows", "beetles", "worms", "spiders", "swans", "geese", "crickets", "moths",
                        "doves", "robins", "ladybugs", "larks", "seagulls", "lizards", "bats", "wasps"),
    "flowers": ranked("daisies", "roses", "tulips", "poppies", "violets", "lilies", "bluebells", "sunflowers",
                      "pansies", "clover", "daffodils", "irises"),
    "body": ranked("hands", "shirt", "shoes", "knees", "arms", "feet", "toes", "sleeves"),
    "new": ranked("new", "small", "big", "tiny", "soft", "long", "round", "heavy", "thin", "light"),
    "small": ranked("little", "small", "tiny", "baby", "poor", "young", "frightened", "shivering", "quiet",
                    "thin", "dirty", "sad"),
    "soft": ranked("soft", "strange", "small", "sad", "loud", "funny", "quiet", "sudden", "low", "high",
                   "new", "weak"),
    "strong": ranked("strong", "cold", "sudden", "wild", "loud", "mighty", "big", "warm"),
    "naughty": ranked("naughty", "cheeky", "sneaky", "playful", "fat", "hungry", "black", "sleepy", "brown",
                      "fast", "bad", "wild"),
    "thief": ranked("dog", "monkey", "crow", "cat", "raccoon", "magpie", "sheep", "bird", "goat", "fox",
                    "wolf", "pig"),
    "times": ranked("once", "twice", "three times", "again and again", "all day", "for a long time",
                    "many times", "very hard"),
    "dish": ranked("plate", "tray", "dish", "bowl", "cloth", "cart"),
    "clothes": ranked("coat", "cap", "jacket", "sweater", "shirt", "hat", "scarf", "robe", "raincoat", "bow",
                      "belt", "mask"),
    "hue": ranked("red", "blue", "yellow", "green", "pink", "white", "black", "purple", "golden", "brown",
                  "gray", "silver"),
    "holder": ranked("basket", "bag", "box", "jar", "sack", "pot", "bucket", "crate"),
    "shelf": ranked("cupboard", "kitchen", "pantry", "fridge", "cellar", "drawer", "oven", "attic"),
    "corner": ranked("on the table", "on the shelf", "under the sink", "behind the door", "in every pot",
                     "in all the bags", "by the stove", "on the stairs"),
    "calm": ranked("stay calm", "go slowly", "stand up straight", "wait a moment", "be brave", "relax",
                   "rest", "think"),
    "then_calm": ranked("take a deep breath", "look ahead", "try once more", "count to three", "smile",
                        "listen to the wind", "hold on", "sing"),
    "relative": ranked("grandmother", "parents", "cousin", "godfather", "neighbor", "best friend", "twin",
                       "niece"),
    "fed": ranked("fresh water", "warm milk", "bread", "carrots", "an apple", "seeds", "hay", "nuts"),
    "nature": ranked("cheerful", "curious", "gentle", "playful", "friendly", "careful", "lively", "dreamy",
                     "helpful", "patient", "sleepy", "merry", "honest", "eager", "thoughtful", "hungry"),
    "virtue": ranked("careful", "brave", "gentle", "kind", "patient", "calm", "quiet", "polite", "honest",
                     "quick", "fair", "nice"),
    "tired": ranked("lonely", "confused", "helpless", "tired", "lost", "cross", "hurt", "grumpy", "hopeless",
                    "weak", "cold", "bored", "restless", "blue"),
    "warmly": ranked("warmly", "brightly", "sweetly", "kindly", "shyly", "softly", "slowly", "at once",
                     "a little", "for a while", "gently", "happily"),
    "savory": ranked("sandwiches", "popcorn", "soup", "noodles", "toast", "rice", "cheese", "bread",
                     "potatoes", "beans", "pretzels", "eggs", "corn", "salad", "dumplings", "nuts"),
    "fruit": ranked("apples", "strawberries", "cherries", "pears", "plums", "bananas", "peaches", "melon",
                    "raisins", "grapes", "oranges", "figs"),
    "fur": ranked("little", "big", "small", "white", "brown", "black", "gray", "young", "fat", "hungry",
                  "noisy", "sleepy", "happy", "shy", "friendly", "spotted", "wild", "tiny", "funny", "wet",
                  "quick", "lazy", "clever", "golden"),
    "beasts": ranked("rabbits", "sheep", "cows", "squirrels", "horses", "goats", "cats", "puppies", "deer",
                     "foxes", "pigs", "lambs", "hens", "ponies", "donkeys", "calves", "kittens", "hedgehogs",
                     "bears", "monkeys", "wolves", "camels", "lions", "moles", "badgers", "zebras"),
    "tint": ranked("red", "white", "yellow", "pink", "purple", "blue", "orange", "golden"),
    "eyes": ranked("big", "brown", "green", "blue", "dark", "bright", "sad", "shiny"),
    "face": ranked("nose", "hair", "cheeks", "ears", "chin", "face", "forehead", "neck"),
    "pretty": ranked("pretty", "lovely", "shiny", "beautiful", "wonderful", "nice", "strange", "clean",
                     "fine", "bright"),
    "half": ranked("morning", "afternoon", "evening", "night"),
    "lonesome": ranked("poor", "small", "forgotten", "hungry", "thirsty", "homesick", "dizzy", "sleepy",
                       "sick", "ashamed"),
    "loved": ranked("free", "safe", "warm", "loved", "rich", "strong", "alive", "at home", "full",
                    "at peace"),
    "lesson": ranked("to share", "that friends help each other", "never to give up", "to be kind",
                     "to ask for help", "to be brave", "to be patient", "that little things matter",
                     "to listen", "always to be honest", "to say sorry", "to say thank you", "to be careful",
                     "to wait", "to try again", "not to worry"),
}  # fmt: skip

# --- sentences

OPENINGS = {
    "opening": weighted(
        (5, "Once upon a time, there was a [trait], [nature] {kid} named {hero}."),
        (4, "Once there was a [trait] {kid} called {hero}, who lived [spot]."),
        (3, "There once was a [trait], [nature] {kid} named {hero}."),
        (4, "In a [size] [home] [spot], there lived a [trait] {kid} named {hero}."),
        (3, "A [trait] {kid} named {hero} lived in a [size] [town] with [number] [creatures]."),
        (2, "This is the story of a [trait] {kid} called {hero} and [number] [fur] [beasts]."),
    ),
    "on_day": weighted(
        (5, "One [weather] [part],"),
        (3, "One [weekday] [half],"),
        (2, "On a [weather] [weekday],"),
        (1, "It was a [weather] [part] when"),
    ),
    # What there is to see on the way.
    "scene": weighted(
        (4, "{kid.He} [act] past [number] [fur] [creatures] and [act] [spot]."),
        (4, "There were [number] [fur] [beasts] [spot], and they [act]."),
        (3, "{kid.He} saw [number] [fur] [creatures], [number] [beasts] and a [new] [mark]."),
        (2, "[sky], and [number] [fur] [beasts] [act] [spot]."),
        (2, "{kid.He} wore a [hue] [clothes] and [act] with [number] [creatures]."),
    ),
    "meal": weighted(
        (4, "They ate [savory], [treat] and [fruit] [where]."),
        (3, "They had [savory] and [treat] with [number] [fur] [beasts] [where]."),
        (3, "They [act], [act] and ate [treat] until [until]."),
        (2, "{hero} felt [very] [glad] and made [savory] and [treat]."),
    ),
}

ENDINGS = {
    "end_friends": weighted(
        (4, "From that [part] on, {hero} and {friend} were [glad] and [loved]."),
        (4, "{hero} and {friend} [act], [act] and [act] until [until]."),
        (4, "{hero} had learned [lesson] and felt [very] [glad]."),
        (3, "That night, {hero} thought of {friend} and [number] [fur] [beasts]."),
        (3, "\"You are a [trait] friend, {friend},\" [said] {hero} [kindly]."),
        (2, "And they all lived happily ever after [spot]."),
    ),
    "end_family": weighted(
        (4, "That night, {hero} and {kid.his} {helper} talked about [number] [fur] [beasts]."),
        (4, "{hero} had learned [lesson] and felt [very] [glad]."),
        (3, "\"You are a [trait] {kid}, {hero},\" [said] {kid.his} {helper} [kindly]."),
        (3, "{hero} and {kid.his} {helper} [act], [act] and [act] until [until]."),
        (2, "And they all lived happily ever after [spot]."),
    ),
    "end_animal": weighted(
        (4, "{pet} came back every [season] and [act] with {hero} [spot]."),
        (4, "{hero} and {pet} [act], [act] and [act] until [until]."),
        (3, "That night, {pet} slept [spot] and felt [very] [glad]."),
        (3, "{hero} had learned [lesson], and {pet} was [very] [glad]."),
        (2, "And {hero} and {pet} lived happily ever after [spot]."),
    ),
}

LOST_TOY = {
    "lost_toy": weighted(
        (1, "[opening] [toy] [walk_out] [scene]\n[gone] [crying] [friend_comes] [offers] [search] [found]\n"
            "[meal] [end_friends]"),
    ),
    "toy": weighted(
        (4, "{kid.He} loved {kid.his} {color} {object}."),
        (3, "{kid.He} had a [new], [pretty] {color} {object}."),
        (3, "{kid.His} [relative] gave {kid.him} a [new] {color} {object}."),
        (2, "{kid.He} had found a [new] {color} {object} [spot]."),
    ),
    "walk_out": weighted(
        (3, "[on_day] {hero} took the {object} {place.to}."),
        (3, "[on_day] {kid.he} [hurry] {place.to} with the {object} and [treat]."),
        (2, "[on_day] {kid.he} took it {place.to} to see [number] [fur] [beasts]."),
    ),
    "gone": weighted(
        (3, "But when {kid.he} came to the [looks] [mark], the {object} was gone."),
        (3, "But then a [strong] wind blew the {object} over the [looks] [mark]."),
        (3, "Then a [naughty] [thief] took the {object} and hid it [spot]."),
        (2, "{kid.He} counted [number] [fur] [beasts], and then the {object} was gone."),
        (2, "{kid.He} ate [savory] and [treat] [where], and then the {object} was gone."),
    ),
    "crying": weighted(
        (4, "{hero} was [very] [sad] and [very] [tired]."),
        (3, "{hero} felt [sad] and cried [spot]."),
        (2, "\"Oh no!\" [said] {hero} and looked [spot]."),
        (2, "{kid.He} looked [spot] and felt [very] [sad]."),
    ),
    "friend_comes": weighted(
        (3, "Then {kid.his} [trait] friend {friend} [hurry] over."),
        (3, "{kid.His} friend {friend} was [spot] and saw {kid.him}."),
        (3, "Soon {friend}, a [trait] {friend.kid} in a [hue] [clothes], [hurry] over."),
        (2, "A [trait] friend named {friend} heard {kid.him} and [hurry] over."),
    ),
    "offers": weighted(
        (4, "\"Do not be [sad],\" [said] {friend} [kindly]."),
        (3, "\"Let us look for it,\" [said] {friend} [kindly]."),
        (3, "\"Maybe it is [spot],\" [said] {friend} [kindly]."),
        (2, "{friend} smiled [warmly] and gave {kid.him} [treat]."),
    ),
    "search": weighted(
        (4, "They looked [spot] and [spot]."),
        (3, "First they looked [spot], then [spot]."),
        (3, "{hero} looked [spot], and {friend} looked [spot]."),
        (3, "They asked [number] [fur] [creatures] and [number] [fur] [beasts]."),
    ),
    "found": weighted(
        (4, "At last, {friend} found the {object} [spot]."),
        (3, "Then {hero} saw something {color} [spot]. It was the {object}!"),
        (3, "And there, [spot], was the {color} {object}!"),
        (2, "At last, [number] [fur] [beasts] showed them the {object}."),
    ),
}

ANIMAL_FRIEND = {
    "animal_friend": weighted(
        (1, "[opening] [likes] [hears] [sees]\n[wrong] [runs_home] [mends] [comforts]\n"
            "[is_well] [thanks] [names] [end_animal]"),
    ),
    "likes": weighted(
        (4, "{kid.He} loved [creatures], [beasts] and [flowers]."),
        (3, "{kid.He} often went {place.to} to see [creatures] and [flowers]."),
        (3, "Every [season], {kid.he} went {place.to} to pick [tint] [flowers]."),
        (2, "{kid.He} had [number] [fur] [beasts] near {place}."),
    ),
    "hears": weighted(
        (3, "[on_day] {hero} saw [number] [fur] [beasts] and heard a [soft] sound [spot]."),
        (3, "[on_day] {kid.he} [act] and [act], and then a [soft] noise came from the [looks] [mark]."),
        (2, "[on_day] {kid.he} heard a [soft] cry [spot]."),
    ),
    "sees": weighted(
        (4, "It was a [small], [small] {animal}."),
        (3, "There, all alone, sat a [small] {animal}."),
        (3, "A [small] {animal} with [eyes] eyes was [spot]."),
    ),
    "wrong": weighted(
        (4, "It {trouble} and was [very] [sad]."),
        (3, "The {animal} {trouble} and felt [sad] and [tired]."),
        (3, "It {trouble} and looked at [number] [fur] [beasts]."),
    ),
    "comforts": weighted(
        (3, "\"Do not be [sad],\" {hero} [said] [kindly]."),
        (3, "{hero} gave it [fed] and [fed] and sat by it."),
        (2, "\"You [small] {animal},\" [said] {hero} [kindly]."),
        (2, "{kid.He} sang [warmly] until the {animal} felt [glad]."),
    ),
    "runs_home": weighted(
        (3, "Then {kid.he} [hurry] past the [looks] [mark] to get {kid.his} {helper}."),
        (3, "{kid.He} called {kid.his} {helper}, who was [spot]."),
        (2, "{kid.He} [hurry] home to {kid.his} {helper} with the {animal}."),
    ),
    "mends": weighted(
        (4, "Together they {trouble.fix}."),
        (3, "{hero} and {kid.his} {helper} {trouble.fix}."),
        (2, "\"Be [virtue],\" [said] {kid.his} {helper}, and they {trouble.fix}."),
    ),
    "bed": ranked("blanket", "pillow", "towel", "ribbon", "bed", "ball", "scarf", "sack"),
    "is_well": weighted(
        (3, "On [weekday], {trouble.well}."),
        (3, "After [number] days, {trouble.well}."),
        (3, "That [part], {trouble.well}."),
        (2, "Soon {trouble.well}."),
    ),
    "thanks": weighted(
        (3, "The {animal} [act] and [act] with [number] [fur] [beasts]."),
        (3, "The {animal} was [very] [glad] and [act] [spot]."),
        (3, "Even [number] [fur] [beasts] [act] with the {animal}."),
    ),
    "names": weighted(
        (3, "{hero} named it {pet}."),
        (2, "\"I will call you {pet},\" [said] {hero} [kindly]."),
        (2, "{kid.He} called it {pet} and gave it [tint] [flowers]."),
    ),
}

QUARREL = {
    "quarrel": weighted(
        (1, "[opening] [two_go] [scene] [finds_toy]\n[mine] [no_mine] [pulls] [both_sad] [helper_says]\n"
            "[sorry] [repairs] [meal] [end_friends]"),
    ),
    "two_go": weighted(
        (4, "[on_day] {hero} and {friend} [hurry] {place.to}."),
        (3, "[on_day] {kid.he} met {kid.his} [trait] friend {friend} {place.at}."),
        (2, "[on_day] {kid.he} [hurry] {place.to} with {friend}, a [trait] {friend.kid}."),
    ),
    "finds_toy": weighted(
        (3, "They found a [new], [pretty] {color} {object} [spot]."),
        (3, "Then {friend} saw a [new] {color} {object} [spot]."),
        (2, "Then [number] [fur] [beasts] showed them {color.a} {object}."),
    ),
    "mine": weighted(
        (4, "\"It is mine!\" [said] {hero} [kindly]."),
        (3, "\"My {object}!\" {hero} [said] [kindly]."),
        (2, "\"I want the {color} {object}!\" [said] {hero} [kindly]."),
    ),
    "no_mine": weighted(
        (4, "\"No, it is mine!\" [said] {friend} [kindly]."),
        (3, "\"I saw it first!\" {friend} [said] [kindly]."),
        (3, "{friend} felt [very] [sad] and took it."),
    ),
    "pulls": weighted(
        (4, "They pulled [times] until it {damage}."),
        (3, "{hero} pulled, {friend} pulled, and it {damage}."),
        (3, "{friend} threw it over the [looks] [mark], and it {damage}."),
    ),
    "both_sad": weighted(
        (3, "Now {hero} was [very] [sad], and {friend} was [very] [tired]."),
        (3, "Both of them felt [sad], [tired] and [lonesome]."),
        (2, "{hero} cried [spot], and {friend} felt [very] [sad]."),
    ),
    "helper_says": weighted(
        (3, "\"You can share,\" [said] {kid.his} {helper} [kindly]."),
        (3, "Then {kid.his} {helper} [hurry] over with [number] [fur] [beasts]."),
        (3, "\"Be [virtue] and [virtue],\" [said] {kid.his} {helper} [kindly]."),
        (2, "{kid.His} {helper} was [spot] and felt [sad]."),
    ),
    "sorry": weighted(
        (4, "\"I am sorry, {friend},\" [said] {hero} [kindly]."),
        (3, "{hero} was [very] sorry and gave {friend} [savory] and [treat]."),
        (2, "{hero} thought about it and [said], \"You can have it.\""),
    ),
    "repairs": weighted(
        (4, "Together they {damage.fix}."),
        (3, "{kid.His} {helper} smiled [warmly], and they {damage.fix}."),
        (2, "Then {hero} and {friend} {damage.fix}."),
    ),
}

LEARNING = {
    "learning": weighted(
        (1, "[opening] [wish] [fear]\n[goes] [scene] [fails] [fails_sad] [tip] [deep_breath] [wins]\n"
            "[joy] [meal] [end_family]"),
    ),
    "wish": weighted(
        (4, "{kid.He} wanted to {skill}."),
        (3, "Every [season], {kid.he} wished to {skill}."),
        (2, "{kid.His} [relative] could {skill}, but {hero} could not."),
    ),
    "fear": weighted(
        (4, "But {kid.he} was [very] afraid of {skill.fear}."),
        (3, "But {skill.ing} made {kid.him} [very] [sad]."),
        (2, "\"I do not like {skill.fear},\" {kid.he} [said] [kindly]."),
    ),
    "goes": weighted(
        (3, "[on_day] {hero} and {kid.his} {helper} were {skill.at} with [treat]."),
        (3, "[on_day] {kid.his} {helper} found {kid.him} {skill.at}."),
        (2, "[on_day] {kid.he} asked {kid.his} {helper} for help with {skill.ing}."),
    ),
    "fails": weighted(
        (4, "{hero} tried [times], but {skill.fail}."),
        (3, "But {skill.fail}, and [number] [fur] [beasts] looked at {kid.him}."),
        (2, "{kid.He} felt [very] [glad], but {skill.fail}."),
    ),
    "fails_sad": weighted(
        (3, "\"I am too [sad],\" {kid.he} [said] and sat down [spot]."),
        (3, "{hero} sat [spot] and felt [very] [sad]."),
        (3, "{kid.His} [face] and [body] hurt, and {kid.he} felt [sad] and [tired]."),
    ),
    "tip": weighted(
        (3, "\"You have to [calm],\" {helper.he} [said] [kindly]."),
        (3, "{helper.He} showed {kid.him} [kindly] how to [calm] and [then_calm]."),
        (2, "\"Think of [number] [fur] [beasts],\" {helper.he} [said] [kindly]."),
    ),
    "deep_breath": weighted(
        (3, "So {hero} tried again and did not think of {skill.fear}."),
        (3, "{hero} thought of [number] [fur] [beasts] [spot] and began."),
        (2, "{kid.He} did it [times] and [act] until [until]."),
    ),
    "wins": weighted(
        (4, "And then {kid.he} {skill.win}!"),
        (3, "At last, {hero} {skill.win}!"),
        (2, "On [weekday], {kid.he} {skill.win}!"),
    ),
    "joy": weighted(
        (3, "\"I did it!\" {hero} [said] [kindly] and [act] and [act]."),
        (3, "{hero} felt [very] [glad] and [act] and [act] [spot]."),
        (2, "\"I can {skill} now!\" [said] {hero} [kindly]."),
    ),
}

SURPRISE = {
    "surprise": weighted(
        (1, "[opening] [birthday] [plan]\n[searches] [empty] [goes_out] [scene] [meets] [gives] [mess]\n"
            "[serves] [meal] [end_family]"),
    ),
    "birthday": weighted(
        (3, "On [weekday], it was the birthday of {kid.his} {helper}."),
        (3, "[on_day] {kid.his} {helper} felt [sad], [tired] and [lonesome]."),
        (3, "[on_day] {kid.he} wanted to make {kid.his} {helper} [glad]."),
    ),
    "plan": weighted(
        (4, "\"I will make {food.a},\" [said] {hero} [kindly]."),
        (3, "{hero} wanted to make {food.a} for {helper.him}."),
        (2, "{hero} knew that {helper.he} liked {food}, [savory] and [treat]."),
    ),
    "searches": weighted(
        (3, "{kid.He} [hurry] to the [shelf] and looked [corner]."),
        (3, "{kid.He} found [treat] in the [shelf] and [treat] [corner]."),
        (3, "There were [savory], [treat] and [fruit] in the [looks] [shelf]."),
    ),
    "empty": weighted(
        (4, "But there {food.none}, and {hero} felt [very] [sad]."),
        (3, "\"But there {food.none},\" {kid.he} [said] [kindly]."),
    ),
    "goes_out": weighted(
        (4, "So {kid.he} put on a [hue] [clothes] and [hurry] {place.to}."),
        (3, "{kid.He} took a [new], [pretty] {color} [holder] and [hurry] {place.to}."),
    ),
    "meets": weighted(
        (4, "There {kid.he} met {kid.his} [trait] friend {friend} [spot]."),
        (3, "{kid.His} friend {friend} was there with [number] [fur] [beasts]."),
        (2, "{friend}, a [trait] {friend.kid}, was [spot]."),
    ),
    "gives": weighted(
        (4, "\"This is for you,\" [said] {friend} and gave {kid.him} a [new] [holder] of {food.missing}."),
        (3, "{friend} had a [new], [pretty] [holder] of {food.missing} [spot]."),
        (2, "\"Come with me,\" [said] {friend} [kindly] and took a [new] [holder]."),
    ),
    "mess": weighted(
        (3, "The flour got on {friend.his} [face] and [body], and they [act]."),
        (3, "At home, {hero} stirred, and {friend} [act], [act] and [act]."),
        (3, "They cooked and [act] and [act] until [until]."),
    ),
    "serves": weighted(
        (3, "They put the {food} on a [new] [hue] [dish] for {kid.his} {helper}."),
        (3, "Then {kid.his} {helper} saw the {food} and [tint] [flowers] on a [dish]."),
    ),
}

PLOTS = {
    "story": weighted(
        (6, "[lost_toy]"), (5, "[animal_friend]"), (4, "[quarrel]"), (4, "[learning]"), (3, "[surprise]")
    ),
}

PICKS: dict[str, Alternatives] = {
    **WORDS, **OPENINGS, **ENDINGS, **LOST_TOY, **ANIMAL_FRIEND, **QUARREL, **LEARNING, **SURPRISE, **PLOTS,
}  # fmt: skip
START = "story"
