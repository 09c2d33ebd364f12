"""What the model learns about real dinosaurs: data only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dinosaur:
    name: str
    meaning: str
    period: str
    diet: str
    length_m: int
    place: str
    feature: str

    @property
    def length(self) -> str:
        return "1 metre" if self.length_m == 1 else f"{self.length_m} metres"

    @property
    def eater(self) -> str:
        return {"plants": "plant-eating", "meat": "meat-eating", "fish": "fish-eating"}.get(
            self.diet, "omnivorous"
        )


_LT = "Late Triassic"
_EJ, _MJ, _LJ = "Early Jurassic", "Middle Jurassic", "Late Jurassic"
_EC, _LC = "Early Cretaceous", "Late Cretaceous"
_NA = "North America"

# fmt: off
DINOSAURS = tuple(Dinosaur(*row) for row in (
    ("Tyrannosaurus", "tyrant lizard", _LC, "meat", 12, _NA,
     "its huge head and tiny arms"),
    ("Triceratops", "three-horned face", _LC, "plants", 9, _NA,
     "its three horns and bony frill"),
    ("Velociraptor", "swift thief", _LC, "meat", 2, "Mongolia",
     "its feathers and the curved claw on each foot"),
    ("Stegosaurus", "roof lizard", _LJ, "plants", 7, _NA,
     "the plates on its back and the spikes on its tail"),
    ("Brachiosaurus", "arm lizard", _LJ, "plants", 22, _NA,
     "its long neck and long front legs"),
    ("Diplodocus", "double beam", _LJ, "plants", 26, _NA,
     "its very long tail like a whip"),
    ("Apatosaurus", "deceptive lizard", _LJ, "plants", 22, _NA,
     "its thick and heavy neck"),
    ("Allosaurus", "different lizard", _LJ, "meat", 9, _NA,
     "the small horns above its eyes"),
    ("Spinosaurus", "spine lizard", _LC, "fish", 14, "North Africa",
     "the tall sail on its back"),
    ("Ankylosaurus", "fused lizard", _LC, "plants", 7, _NA,
     "its heavy armour and tail club"),
    ("Iguanodon", "iguana tooth", _EC, "plants", 9, "Europe",
     "the spike on each thumb"),
    ("Parasaurolophus", "near crested lizard", _LC, "plants", 9, _NA,
     "its long hollow crest"),
    ("Pachycephalosaurus", "thick-headed lizard", _LC, "plants", 4, _NA,
     "its thick domed skull"),
    ("Compsognathus", "elegant jaw", _LJ, "meat", 1, "Europe",
     "being no bigger than a chicken"),
    ("Coelophysis", "hollow form", _LT, "meat", 3, _NA,
     "its light hollow bones"),
    ("Plateosaurus", "broad lizard", _LT, "plants", 8, "Europe",
     "its long neck and big thumb claws"),
    ("Eoraptor", "dawn thief", _LT, "plants and meat", 1, "Argentina",
     "being one of the earliest dinosaurs"),
    ("Herrerasaurus", "Herrera's lizard", _LT, "meat", 5, "Argentina",
     "being one of the first big hunters"),
    ("Dilophosaurus", "two-crested lizard", _EJ, "meat", 7, _NA,
     "the two thin crests on its head"),
    ("Ceratosaurus", "horned lizard", _LJ, "meat", 6, _NA,
     "the horn on its nose"),
    ("Carnotaurus", "meat-eating bull", _LC, "meat", 8, "Argentina",
     "the two thick horns on its head"),
    ("Giganotosaurus", "giant southern lizard", _LC, "meat", 12, "Argentina",
     "its enormous skull"),
    ("Argentinosaurus", "Argentine lizard", _LC, "plants", 35, "Argentina",
     "being one of the largest land animals ever"),
    ("Baryonyx", "heavy claw", _EC, "fish", 9, "England",
     "the large claw on each thumb"),
    ("Suchomimus", "crocodile mimic", _EC, "fish", 11, "Niger",
     "its long snout like a crocodile"),
    ("Therizinosaurus", "scythe lizard", _LC, "plants", 10, "Mongolia",
     "its giant claws"),
    ("Gallimimus", "chicken mimic", _LC, "plants and meat", 6, "Mongolia",
     "running fast like an ostrich"),
    ("Oviraptor", "egg thief", _LC, "plants and meat", 2, "Mongolia",
     "its toothless beak"),
    ("Protoceratops", "first horned face", _LC, "plants", 2, "Mongolia",
     "its frill and beak"),
    ("Psittacosaurus", "parrot lizard", _EC, "plants", 2, "Asia",
     "its beak like a parrot"),
    ("Maiasaura", "good mother lizard", _LC, "plants", 9, _NA,
     "caring for its babies in nests"),
    ("Edmontosaurus", "Edmonton lizard", _LC, "plants", 12, _NA,
     "its bill like a duck"),
    ("Corythosaurus", "helmet lizard", _LC, "plants", 8, _NA,
     "its crest shaped like a helmet"),
    ("Lambeosaurus", "Lambe's lizard", _LC, "plants", 9, _NA,
     "its crest shaped like an axe"),
    ("Styracosaurus", "spiked lizard", _LC, "plants", 5, _NA,
     "the long spikes around its frill"),
    ("Pachyrhinosaurus", "thick-nosed lizard", _LC, "plants", 7, _NA,
     "the thick bony bump on its nose"),
    ("Deinonychus", "terrible claw", _EC, "meat", 3, _NA,
     "the sickle claw on each foot"),
    ("Utahraptor", "Utah's predator", _EC, "meat", 6, _NA,
     "being the largest known raptor"),
    ("Microraptor", "tiny thief", _EC, "meat", 1, "China",
     "its four feathered wings"),
    ("Sinosauropteryx", "Chinese reptile wing", _EC, "meat", 1, "China",
     "its fuzzy striped tail"),
    ("Yutyrannus", "feathered tyrant", _EC, "meat", 9, "China",
     "its shaggy coat of feathers"),
    ("Mamenchisaurus", "Mamenchi lizard", _LJ, "plants", 25, "China",
     "its extremely long neck"),
    ("Kentrosaurus", "spiked lizard", _LJ, "plants", 5, "Tanzania",
     "the long spikes on its back and tail"),
    ("Giraffatitan", "titanic giraffe", _LJ, "plants", 22, "Tanzania",
     "holding its neck high in the air"),
    ("Amargasaurus", "La Amarga lizard", _EC, "plants", 10, "Argentina",
     "the two rows of spines on its neck"),
    ("Muttaburrasaurus", "Muttaburra lizard", _EC, "plants", 8, "Australia",
     "its big arched nose"),
    ("Cryolophosaurus", "cold crest lizard", _EJ, "meat", 6, "Antarctica",
     "the crest on its head like a comb"),
    ("Troodon", "wounding tooth", _LC, "meat", 2, _NA,
     "its big eyes and large brain"),
    ("Tarbosaurus", "alarming lizard", _LC, "meat", 10, "Mongolia",
     "its tiny arms and strong bite"),
    ("Megalosaurus", "great lizard", _MJ, "meat", 6, "England",
     "being the first dinosaur to be named"),
    ("Camarasaurus", "chambered lizard", _LJ, "plants", 15, _NA,
     "the hollow chambers in its backbone"),
    ("Nigersaurus", "Niger lizard", _EC, "plants", 9, "Niger",
     "its wide mouth with five hundred teeth"),
    ("Carcharodontosaurus", "shark-toothed lizard", _LC, "meat", 12, "North Africa",
     "its teeth like a shark"),
))
# fmt: on

GENERAL_FACTS = (
    (
        "What is a dinosaur?",
        "Dinosaurs were reptiles that lived on land millions of years ago."
        " Birds are their living relatives.",
    ),
    (
        "When did dinosaurs die out?",
        "Most dinosaurs died out about 66 million years ago, at the end of the Cretaceous.",
    ),
    (
        "Why did the dinosaurs die out?",
        "A huge asteroid hit the Earth about 66 million years ago,"
        " and most dinosaurs could not survive.",
    ),
    (
        "How did the dinosaurs die?",
        "A huge asteroid hit the Earth about 66 million years ago,"
        " and most dinosaurs could not survive.",
    ),
    (
        "Are birds dinosaurs?",
        "Yes. Birds are living dinosaurs: they come from small feathered hunters.",
    ),
    ("Are there any dinosaurs alive today?", "Yes, in a way. Birds are living dinosaurs."),
    (
        "What is a fossil?",
        "A fossil is what is left of a living thing from long ago,"
        " such as a bone that has turned to stone.",
    ),
    ("Who studies dinosaurs?", "A scientist who studies dinosaurs is called a palaeontologist."),
    (
        "What is a palaeontologist?",
        "A palaeontologist is a scientist who studies fossils and ancient life.",
    ),
    ("Did dinosaurs lay eggs?", "Yes. All dinosaurs laid eggs, and some cared for their nests."),
    (
        "Did dinosaurs have feathers?",
        "Many dinosaurs had feathers, above all the small meat eaters.",
    ),
    (
        "When did dinosaurs live?",
        "Dinosaurs lived in the Triassic, Jurassic and Cretaceous,"
        " from about 230 to 66 million years ago.",
    ),
    ("What does the word dinosaur mean?", "The word dinosaur means terrible lizard."),
    (
        "What was the biggest dinosaur?",
        "Argentinosaurus was one of the biggest. It was about 35 metres long.",
    ),
    (
        "What was the largest dinosaur?",
        "Argentinosaurus was one of the largest. It was about 35 metres long.",
    ),
    (
        "What was the smallest dinosaur?",
        "Microraptor was one of the smallest."
        " It was about 1 metre long, and most of that was tail.",
    ),
    (
        "Did people live with dinosaurs?",
        "No. Dinosaurs died out about 66 million years before there were people.",
    ),
    (
        "Was Pteranodon a dinosaur?",
        "No. Pteranodon was a flying reptile, a cousin of the dinosaurs.",
    ),
    (
        "What came first, the Jurassic or the Cretaceous?",
        "The Jurassic came first, and the Cretaceous came after it.",
    ),
    (
        "What is your favourite dinosaur?",
        "My favourite dinosaur is Triceratops. Three horns are better than two!",
    ),
    ("Who named the dinosaurs?", "Richard Owen gave the dinosaurs their name in 1842."),
    (
        "What colour were dinosaurs?",
        "Nobody knows for most of them, but Sinosauropteryx had an orange and white striped tail.",
    ),
)
