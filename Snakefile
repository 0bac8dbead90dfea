"""The records of both papers, every page and the executed run notebooks, made by one command at the top of the repository.

    snakemake --profile profiles/smoke     every notebook once, at a tiny scale: minutes, no download
    snakemake --profile profiles/cpu       the committed results: 16 pixels, narrow networks, more than a day of two cores
    snakemake --profile profiles/gpu       the papers' networks at 32 pixels
    snakemake --profile profiles/slurm     the same, each run a job of its own

`--config data=/some/where/cifar10.tar.xz` at the end names CIFAR-10, else torchvision downloads it; `other=` a tar archive of ImageNet's
class folders (it also gives the bench of a hundred classes and the photographs that are attacked), else CIFAR-100. A second call makes
what is missing; a record that is there is not made again, whatever is in `runs/` (delete it for that). What was run before is in the
cache (`CONDEXP_CACHE`); what was killed goes on from its last epoch. A run that fails does not stop the others; the end of its log is
shown, and the whole of it is in `runs/`. The commands of other records (`datafree-*`, `predict-*`, `speed*`) are in reports/README.md.
"""

import json
import tarfile
from pathlib import Path

SCALES = {
    "cpu": dict(
        scale="-p size 16 -p precision bf16 -p epochs 20 -p steps 40 -p batch_size 64",  # faster on a CPU with AMX
        pairs={"wrn": "wrn_10_2 wrn_10_1", "convnet": "wrn_10_2 convnet3_w64"},
        plain={"vit": "vit_cifar wrn_10_1"},  # the teacher has no BatchNorm, whose statistics an inversion could match
        steps={"cmi": 30},  # generator steps a batch, where the method's own are too many
        transfer="-p size 16 -p precision bf16 -p epochs 20 -p steps 100 -p batch_size 64",
        transfer_bench="cifar",  # whose teachers and student Paper B's sets are tried with
        budget=10,
        families=("wrn_10_2", "vit_cifar", "convnext_cifar"),
        patience=(3, 10, 30),
        images=10_000,
        programs=256,
        seeds=3,
    ),
    "gpu": dict(
        scale="-p size 32 -p epochs 100 -p steps 200 -p batch_size 256",
        pairs={
            "r34-r18": "resnet34_cifar resnet18_cifar",
            "r34-mbv2": "resnet34_cifar mobilenetv2_cifar",
            "wrn40": "wrn_40_2 wrn_16_1",
            "wrn40-40": "wrn_40_2 wrn_40_1",
            "wrn40-16": "wrn_40_2 wrn_16_2",
            "vgg-r18": "vgg11_bn_cifar resnet18_cifar",
        },
        plain={"vit": "vit_cifar resnet18_cifar"},
        steps={},
        transfer="-p size 32 -p epochs 40 -p steps 200 -p batch_size 256",
        transfer_bench="transfer",
        budget=5,
        families=("resnet50_cifar", "vit_cifar", "convnext_cifar"),
        patience=(25, 100, 400),
        images=50_000,
        programs=1089,
        seeds=3,
    ),
}
NAME = config.get("scale", "cpu")
SIZE = "gpu" if NAME == "gpu" else "cpu"  # the smoke profile has runs of its own
SCALE, DATA, OTHER = SCALES[SIZE], config.get("data", "cifar10"), config.get("other", "cifar100")
PREFIX = "" if NAME == "cpu" else f"{NAME}-"
RUNS = {}  # the record's name: notebook, parameters


def add(notebook, name, parameters):
    scale = SCALE["scale"] if notebook != "run_condense" else SCALE["scale"].split(" -p epochs")[0]
    RUNS[PREFIX + name] = (notebook, f"-p dataset {DATA} {scale} {parameters}")


def networks(pair):
    return "-p teacher {} -p student {}".format(*(SCALE["pairs"] | SCALE["plain"])[pair].split())


WITHOUT_BN = "fast without bn"  # Fast with one term left out


def called(inversion):
    "In the names of files."
    return "fast_bn0" if inversion == WITHOUT_BN else inversion


def method(inversion):
    "The parameters of an inversion."
    name, weights = ("fast", " -y 'term_weights: {bn: 0}'") if inversion == WITHOUT_BN else (inversion, "")
    return f"-p inversion {name} -p inversion_steps {SCALE['steps'].get(inversion, 0)}{weights}"


def add_alignment(name, weights, seed, more, inversion="fast"):
    "A run for each weight, of all alignments that are tried with it."
    for weight, alignments in weights.items():
        asked = f"-p alignments {','.join(alignments)} -p alignment_weight {weight} -p seed {seed} {more}"
        add("run_alignment", f"{name}-w{weight}-seed{seed}", f"{networks(first)} {method(inversion)} {asked}")


def add_kd(inversion, pair, ipc, condenser, seed):
    given = f"-p condenser {condenser} -p ipc {ipc} -p seed {seed}"
    add("run_kd", f"kd-{called(inversion)}-{pair}-{condenser}{ipc}-seed{seed}", f"{networks(pair)} {method(inversion)} {given}")


first = next(iter(SCALE["pairs"]))
for seed in range(SCALE["seeds"]):
    for pair in SCALE["pairs"]:
        for inversion in ("fast", "pre_dfkd", "cmi"):  # the main table
            add_kd(inversion, pair, 10, "dm", seed)
    for pair in SCALE["plain"]:
        add_kd("fast", pair, 10, "dm", seed)
    add_kd(WITHOUT_BN, first, 10, "dm", seed)  # what feature alignment adds where BatchNorm's statistics are left out
    for ipc in (1, 50):  # the ipc curve
        for inversion in ("fast", "pre_dfkd"):
            add_kd(inversion, first, ipc, "dm", seed)
    for condenser in ("mtt", "dsa", "random"):  # the condensation ablation, and few real images
        for ipc in (1, 10):
            add_kd("fast", first, ipc, condenser, seed)
    for inversion in ("pre_dfkd", "cmi"):  # and other methods with few real images
        add_kd(inversion, first, 10, "random", seed)
    for condenser in ("random", "herding", "dm", "dsa", "mtt"):
        for ipc in (1, 10, 50):
            add("run_condense", f"condense-{condenser}{ipc}-seed{seed}", f"-p condenser {condenser} -p ipc {ipc} -p seed {seed}")

KINDS = ["conditional", "gradient_penalty", "unconditional", "hinge", "least_squares", "instance_noise", "one_view"]
FEW = [f"{kind}_few" for kind in ("conditional", "spectral", "unconditional", "hinge", "least_squares", "instance_noise", "one_view")]
STUDY = {  # weight: alignments; at one image per class the discriminator is updated once a step anyway
    1: {0.03: FEW[:1], 0.1: ["conditional_few", "least_squares_few"], 0.3: [*FEW, "mmd"], 1: ["mmd"]},
    10: {0.1: ["gradient_penalty"], 0.3: ["conditional", "gradient_penalty", "mmd"], 1: [*KINDS, "one_d_step", "mmd"]},
}
CHOSEN = {  # three kinds, each with the best of its weights on the validation split
    1: {0.03: ["conditional_few"], 0.1: ["least_squares_few"], 0.3: ["mmd"]},
    10: {0.3: ["conditional"], 1: ["unconditional", "mmd"]},
}
OTHERS = {  # does what was chosen with Fast suit other methods, and Fast itself without BatchNorm's statistics?
    (WITHOUT_BN, 10): {3: ["conditional"], 1: [*KINDS, "one_d_step", "mmd"], 0.3: ["conditional", "unconditional", "mmd"]},
    ("pre_dfkd", 10): {1: ["conditional", "mmd"], 0.3: ["conditional"], 0.1: ["conditional"]},
    ("pre_dfkd", 1): {1: ["conditional_few", "mmd"], 0.3: FEW[:1], 0.1: FEW[:1], 0.03: FEW[:1]},
    ("cmi", 10): {1: ["conditional", "mmd"], 0.3: ["conditional"], 0.1: ["conditional"]},
}
MEASURED = {  # kinds, each with the best of its weights at ten images per class; for PRE-DFKD the paper's ablation
    (WITHOUT_BN, 10): {0.3: ["conditional", "mmd"], 1: ["unconditional"]},
    ("pre_dfkd", 10): {0.1: ["conditional", "unconditional"]},
}
for ipc in (10, 1):
    for seed in range(3):  # settings are chosen here, on a validation split of the training images
        add_alignment(f"choose-ipc{ipc}", STUDY[ipc], seed, f"-p evaluate validation -p ipc {ipc}")
    for seed in range(8):  # and what was chosen is measured here
        add_alignment(f"alignment-ipc{ipc}", CHOSEN[ipc], seed, f"-p ipc {ipc}")
for (inversion, ipc), weights in OTHERS.items():
    for seed in range(2):
        more = f"-p evaluate validation -p ipc {ipc}"
        add_alignment(f"choose-{called(inversion)}-ipc{ipc}", weights, seed, more, inversion)
for (inversion, ipc), kinds in MEASURED.items():
    for seed in range(8):
        add_alignment(f"alignment-{called(inversion)}-ipc{ipc}", kinds, seed, f"-p ipc {ipc}", inversion)
BATCHES = {  # what a step learns from: chosen on the validation split, for `mixed` and `expanded` alike
    "proportional": "-p batches proportional",
    "proportional_128": "-p batches proportional -p batch_size 128",  # as many images a step as two terms
    "two_terms-w0.3": "-p batches two_terms -p condensed_weight 0.3",
    "two_terms-w1": "-p batches two_terms -p condensed_weight 1",
}
for ipc in (10, 1, 50):
    for name, given in BATCHES.items():
        for seed in range(3):
            more = f"-p evaluate validation -p arms mixed,expanded -p ipc {ipc} -p seed {seed} {given}"
            add("run_kd", f"batches-ipc{ipc}-{name}-seed{seed}", f"{networks(first)} {method('fast')} {more}")
TWO_TERMS = BATCHES["two_terms-w0.3"]  # the best mean of both methods over three seeds
for seed in range(5):  # and measured on the test split
    more = f"-p condenser dm -p ipc 10 -p seed {seed} {TWO_TERMS} -p arms inversion,mixed,expanded,full"
    add("run_kd", f"two_terms-seed{seed}", f"{networks(first)} {method('fast')} {more}")
PUBLISHED = f"-p inversion fast_published -p keep_warmup True -p temperature 20 -p direction reverse {TWO_TERMS}"
for seed in range(5):  # what is known of Paper A's loss, with Fast as published
    more = f"-p condenser dm -p ipc 10 -p seed {seed} -p arms inversion,mixed,expanded,full"
    add("run_kd", f"published-seed{seed}", f"{networks(first)} {PUBLISHED} {more}")
    more = f"-p batch_size 128 -p ipc 10 -p seed {seed} -p arms inversion"  # as many images a step as two terms
    add("run_kd", f"inversion128-published-seed{seed}", f"{networks(first)} {PUBLISHED} {more}")
    add("run_kd", f"inversion128-two_terms-seed{seed}", f"{networks(first)} {method('fast')} {TWO_TERMS} {more}")
add("run_condense", "whole-seed0", "-p condenser random -p ipc 5000 -p seed 0")  # the whole training set, judged as a condensed one
add("run_condense", "whole_trained-seed0", "-p condenser random -p ipc 5000 -p seed 0 -p epochs 20 -p steps 390 -p batch_size 128")
MARGINS = ("low", "middle", "high")
SETS = dict(ipc1="-p ipc 1", ipc50="-p ipc 50", dsa="-p condenser dsa", mtt="-p condenser mtt", few="-p condenser random")
WEAKER = [("wrn_16_1", 1), ("wrn_16_1", 2), ("wrn_16_1", 3), ("wrn_16_1", 0), ("wrn_10_1", 0)]  # epochs; 0: the usual
if NAME == "cpu":
    for layer in ("body.1", "body.2"):  # the outputs of the first two groups of blocks of a WRN-10-2
        for seed in range(8):
            add_alignment(f"layer-{layer}", {0.3: ["conditional"]}, seed, f"-p ipc 10 -p layer {layer}", WITHOUT_BN)
    for seed in range(3):  # what else the gallery compares with the README's main job, after as many steps
        given = f"-p epochs 16 -p seed {seed}"
        for name in ("shaders", "noise", "single_image"):
            RUNS[f"gallery-{name}-seed{seed}"] = ("run_surrogate", f"-p surrogate {name} -p images 1024 {given}")
        RUNS[f"gallery-leaves-seed{seed}"] = ("run_boundary", f"-p surrogate leaves {given}")
        RUNS[f"gallery-nayer-seed{seed}"] = ("run_kd", f"-p inversion nayer -p arms inversion {given}")
    for seed in range(5):  # the README's main job, on MNIST
        RUNS[f"first-run-seed{seed}"] = ("run_kd", f"-p ipc 10 -p seed {seed}")
        for name, given in SETS.items():  # with other condensed sets, and a few real images
            RUNS[f"mnist-{name}-seed{seed}"] = ("run_kd", f"{given} -p arms condensed,mixed,expanded,full -p seed {seed}")
        for name in ("shaders", "leaves", "noise"):  # sets that are poor for a teacher of digits
            RUNS[f"mnist-boundary-{name}-seed{seed}"] = ("run_boundary", f"-p surrogate {name} -p seed {seed}")
            RUNS[f"mnist-attack-paper-{name}-seed{seed}"] = ("run_boundary", f"-p surrogate {name} -p attack paper -p seed {seed}")
        for name in ("shaders", "single_image"):  # which third of a set teaches best, by the teacher's margin
            for margin in MARGINS:
                given = f"-p surrogate {name} -p images 3000 -p margin {margin} -p seed {seed}"
                RUNS[f"mnist-margin-{name}-{margin}-seed{seed}"] = ("run_surrogate", given)
        for condenser in ("random", "herding", "dm", "dsa", "mtt"):  # what each gives away
            RUNS[f"mnist-condense-{condenser}-seed{seed}"] = ("run_condense", f"-p condenser {condenser} -p ipc 10 -p seed {seed}")
        for model, epochs in WEAKER:  # does a weaker teacher do better where there are few images?
            given = f"-p teacher runs/mnist-{model}-{epochs}-{seed % 3}.safetensors -p arms random,condensed,full -p seed {seed}"
            for ipc in (1, 10):
                RUNS[f"weaker-{model}-{epochs}-ipc{ipc}-seed{seed}"] = ("run_kd", f"{given} -p ipc {ipc}")
        for labels in ("soft", "fixed", "hard"):  # do the methods differ as much with hard labels, and with four times the steps and inverted images?
            for epochs in (16, 64):
                given = f"-p labels {labels} -p epochs {epochs} -p ipc 10 -p seed {seed}"
                RUNS[f"labels-{labels}-{epochs}-seed{seed}"] = ("run_kd", given)


# The trial: enough steps, one of three teachers and a condensed set of its own for each seed, an oracle beside the methods

HUNDRED = "runs/hundred.tar"  # every second class of `other`
BENCHES = {
    "cpu": {
        "cifar": dict(
            data=DATA, teacher="wrn_10_2", student="wrn_10_1", size=16,
            scale="-p precision bf16 -p epochs 40 -p steps 200 -p batch_size 64 -p images 20000", alignment="",
        ),
        "hundred": dict(
            data=HUNDRED, teacher="wrn_16_2", student="wrn_10_1", size=16,
            scale="-p precision bf16 -p epochs 40 -p steps 100 -p batch_size 64 -p images 8000", alignment="-p alignment_ratio 0.3",
        ),
        "mobilenet": dict(  # room: a student of another family (bf16 makes it slower on a CPU), and PRE-DFKD
            data=HUNDRED, teacher="wrn_16_2", student="mobilenetv2_035_cifar", size=16,
            scale="-p inversion pre_dfkd -p precision 32 -p epochs 40 -p steps 100 -p batch_size 64 -p images 4000",
            alignment="-p alignment_ratio 0.3",
        ),
        "resnet": dict(  # Paper A's networks, of their usual width, so with one teacher, and two fifths of the steps and images
            data=HUNDRED, teacher="resnet34_cifar", student="mobilenetv2_cifar", size=16, teachers=1, teacher_scale="-p epochs 8",
            scale="-p inversion pre_dfkd -p precision bf16 -p epochs 16 -p steps 100 -p batch_size 64 -p images 1600",
            alignment="-p alignment_ratio 0.3",
        ),
        "size32": dict(  # for Paper B's sets
            data=DATA, teacher="wrn_16_2", student="wrn_16_1", size=32, teachers=1, scale="",
        ),
    },
    "gpu": {
        "cifar": dict(  # a million images
            data=DATA, teacher="wrn_40_2", student="wrn_16_1", size=32,
            scale="-p epochs 40 -p steps 100 -p batch_size 256 -p images 20000", alignment="",
        ),
        "hundred": dict(  # Paper A's pair and loss, Fast as published
            data=HUNDRED, teacher="resnet34_cifar", student="mobilenetv2_cifar", size=32,
            scale="-p epochs 40 -p steps 100 -p batch_size 128 -p images 20000"
            " -p inversion fast_published -p keep_warmup True -p temperature 20 -p direction reverse -p batches two_terms",
            weights="one_hot: 0.5, adversarial: 1.33",  # of Fast's script for a ResNet-34
            alignment="-p alignment_ratio 0.3",  # as on 16 px: what was chosen there should carry over
        ),
        "transfer": dict(data=DATA, teacher="resnet50_cifar", student="resnet18_cifar", size=32, scale=""),  # Paper B's
    },
}[SIZE]  # fmt: skip
ARMS = "inversion,mixed,expanded,oracle,full"
RATIOS = (0.1, 0.3, 1)  # of the alignment's gradient at the images to the inversion's


def teacher_of(bench, seed):
    "One of the bench's teachers: of three, where it does not say how many."
    return f"runs/{PREFIX}{bench}-teacher{seed % BENCHES[bench].get('teachers', 3)}.safetensors"


def bench_run(bench, ipc, seed, more, without=""):
    "The parameters of a run of the trial, `without` a term of the inversion; one of three teachers for each seed."
    b = BENCHES[bench]
    weights = ", ".join(filter(None, [b.get("weights"), f"{without}: 0" * bool(without)]))
    weighted = f" -y 'term_weights: {{{weights}}}'" * bool(weights)
    return (
        f"-p dataset {b['data']} -p size {b['size']} {b['scale']}{weighted} -p teacher {teacher_of(bench, seed)}"
        f" -p student {b['student']} -p ipc {ipc} -p seed {seed} {more}"
    )


def teacher_run(bench, seed):
    "The parameters of `run_teacher`."
    b = BENCHES[bench]
    precision = "-p precision bf16" if SIZE == "cpu" else ""
    return f"-p dataset {b['data']} -p size {b['size']} -p model {b['teacher']} -p seed {seed} {precision} {b.get('teacher_scale', '')}"


ARCHIVE = bool({".tar", ".tgz", ".txz"} & set(Path(OTHER).suffixes))
if Path(OTHER).suffix == ".zip":
    raise ValueError("other is a zip: it must be a tar archive, a folder, or a set of torchvision")
for bench in ("cifar", "hundred") if ARCHIVE else ("cifar",):
    for ratio in RATIOS:  # the weight of the alignment is chosen here, on a validation split, by a seed that is not measured
        more = f"-p evaluate validation -p alignments conditional -p alignment_ratio {ratio}"
        RUNS[f"{PREFIX}choose-{bench}-ratio{ratio}"] = ("run_alignment", bench_run(bench, 10, 99, more))
    for ipc in (10, 1, 50) if bench == "hundred" and SIZE == "cpu" else (10,):
        more = f"-p arms {ARMS if ipc == 10 else 'condensed,mixed,expanded'} {BENCHES[bench]['alignment']}"
        for seed in range(5):
            RUNS[f"{PREFIX}trial-{bench}-ipc{ipc}-seed{seed}"] = ("run_kd", bench_run(bench, ipc, seed, more))
    more = f"-p arms mixed,expanded {BENCHES[bench]['alignment']}"
    for seed in range(3):  # an inversion that is harder: without BatchNorm's statistics
        RUNS[f"{PREFIX}trial-{bench}-bn0-seed{seed}"] = ("run_kd", bench_run(bench, 10, seed, more, "bn"))
        if bench == "hundred":  # another discriminator, of the same weight
            other = f"{more} -p arms expanded -p alignment unconditional"
            RUNS[f"{PREFIX}trial-unconditional-{bench}-bn0-seed{seed}"] = ("run_kd", bench_run(bench, 10, seed, other, "bn"))
if ARCHIVE and SIZE == "cpu":  # a student of another family; the weight is that of the hundred classes
    for seed in range(3):
        more = f"-p arms mixed,expanded,full {BENCHES['mobilenet']['alignment']}"
        RUNS[f"trial-mobilenet-ipc10-seed{seed}"] = ("run_kd", bench_run("mobilenet", 10, seed, more))
        alone = bench_run("mobilenet", 10, seed, "-p arms inversion")
        RUNS[f"trial-mobilenet-ipc10-inversion-seed{seed}"] = ("run_kd", alone)
        more = f"-p arms inversion,mixed,expanded,full {BENCHES['resnet']['alignment']}"
        RUNS[f"trial-resnet-ipc10-seed{seed}"] = ("run_kd", bench_run("resnet", 10, seed, more))
    more = "-p inversion fast -p images 8000 -p arms mixed,full"  # which leaves no room
    RUNS["trial-mobilenet-fast-seed0"] = ("run_kd", bench_run("mobilenet", 10, 0, more))
for seed in range(5):  # and a slow inversion, so of fewer images
    more = "-p inversion pre_dfkd -p images 8000"
    others = {  # the oracle learns from as many real images; other discriminators have the same weight
        "": "-p arms inversion,mixed,expanded,full",
        "oracle-": "-p arms oracle",
        "unconditional-": "-p arms expanded -p alignment unconditional",
        "auxiliary-": "-p arms expanded -p alignment auxiliary",
    }
    for kind, given in others.items():
        RUNS[f"{PREFIX}trial-{kind}cifar-pre_dfkd-seed{seed}"] = ("run_kd", bench_run("cifar", 10, seed, f"{more} {given}"))


def add_transfer(notebook, name, surrogate, seed, more, teacher=None, bench=SCALE["transfer_bench"]):
    student = BENCHES[bench]["student"]
    teacher = teacher or teacher_of(bench, seed)
    given = f"-p surrogate {surrogate} -p programs {SCALE['programs']} -p budget {SCALE['budget']} -p seed {seed}"
    RUNS[f"{PREFIX}{name}-seed{seed}"] = (
        notebook,
        f"-p dataset {DATA} {SCALE['transfer']} -p teacher {teacher} -p student {student} {given} {more}",
    )


def ablation(name, images):
    "The rows of Paper B's ablation, of so many images; those of few have two fifths."
    policy = "paper" if name == "original" else "paper_synthetic"  # as the code of its first author augments
    many, few = f"-p images {images}", f"-p images {images * 2 // 5}"
    rows = {"hard": f"{many} -p labels hard", "longtail": f"{few} -p sampling longtail", "few": few}
    rows |= {how: f"{many} -p augmentation {given}" for how, given in (("extreme", "extreme"), ("paper", policy))}
    return rows | {"none": f"{many} -p augmentation none -p mixup False"}


MANY = f"-p images {SCALE['images']}"
POOL = f"runs/{PREFIX}kd-fast-{first}-dm10"  # where run_kd leaves what it made
for seed in range(SCALE["seeds"]):
    for name in ("original", "shaders", "leaves", "noise", "single_image", "other-out"):  # the main table
        surrogate, given = (OTHER, f"{MANY} -p part out") if name == "other-out" else (name, MANY)
        add_transfer("run_surrogate", f"surrogate-{name}", surrogate, seed, given)
        if NAME == "cpu":  # and after five times as many steps
            add_transfer("run_surrogate", f"longer-{name}", surrogate, seed, f"{given} -p epochs 100")
            if name in ("original", "shaders"):  # and without augmentation
                more = f"{given} -p epochs 100 -p augmentation none -p mixup False"
                add_transfer("run_surrogate", f"longer_none-{name}", surrogate, seed, more)
    for margin in MARGINS:  # a third of them, by the teacher's margin
        add_transfer("run_surrogate", f"margin-other-out-{margin}", OTHER, seed, f"{MANY} -p part out -p margin {margin}")
    add_transfer("run_surrogate", "surrogate-other-in", OTHER, seed, "-p images 0 -p part in")  # these are fewer
    add_transfer("run_surrogate", "temperature-shaders", "shaders", seed, f"{MANY} -p temperature 2")  # each at the other's
    add_transfer("run_surrogate", "temperature-other-out", OTHER, seed, f"{MANY} -p part out -p temperature 20")
    if ARCHIVE:
        add_transfer("run_boundary", "boundary-photographs", "runs/photographs", seed, "-p images 0")
    add_transfer("run_boundary", "boundary-noise", "noise", seed, "-p images 500")
    add_transfer("run_surrogate", "control-noise", "noise", seed, "-p images 18000 -p sampling none")  # as many as the attack can make
    pool = f"{POOL}-seed{seed}/expanded.images.safetensors"
    pair = SCALE["pairs"][first].split()  # whose teacher the pool was inverted from
    add_transfer("run_boundary", "boundary-pool", pool, seed, "-p images 500 -p sampling none", pair[0])
    for name in ("original", "shaders"):
        for row, more in ablation(name, SCALE["images"]).items():
            add_transfer("run_surrogate", f"ablation-{name}-{row}", name, seed, more)
        for teacher in SCALE["families"]:  # patience
            for epochs in SCALE["patience"]:
                more = f"{MANY} -p epochs {epochs}"  # the last of two counts
                add_transfer("run_surrogate", f"patience-{name}-{teacher}-{epochs}", name, seed, more, teacher)
if NAME == "cpu":
    for seed in range(3):  # the main table, its augmentation and the attack at 32 pixels, with larger networks and one teacher
        for name in ("original", "other-out", "shaders", "leaves", "noise"):
            surrogate, given = (OTHER, f"{MANY} -p part out") if name == "other-out" else (name, MANY)
            add_transfer("run_surrogate", f"size32-surrogate-{name}", surrogate, seed, f"{given} -p size 32", bench="size32")
            if name in ("original", "shaders"):
                more = f"{given} -p size 32 -p augmentation none -p mixup False"
                add_transfer("run_surrogate", f"size32-ablation-{name}-none", surrogate, seed, more, bench="size32")
        add_transfer("run_boundary", "size32-boundary-noise", "noise", seed, "-p images 500 -p size 32", bench="size32")
DIGIT_SETS = dict(original="original", photographs=DATA, shaders="shaders", leaves="leaves", noise="noise", single_image="single_image")
DIGIT_SCALE = "-p epochs 40 -p budget 10"
if NAME == "cpu":
    for seed in range(5):  # the same for a teacher of digits: the order of the sets, and the ablation
        for name, surrogate in DIGIT_SETS.items():
            given = f"-p surrogate {surrogate} -p images 2000 {DIGIT_SCALE} -p seed {seed}"
            RUNS[f"mnist-surrogate-{name}-seed{seed}"] = ("run_surrogate", given)
        for row, more in ablation("shaders", 2000).items():
            given = f"-p surrogate shaders {more} {DIGIT_SCALE} -p seed {seed}"
            RUNS[f"mnist-ablation-shaders-{row}-seed{seed}"] = ("run_surrogate", given)

TABLES = ["first_run", "a_main", "a_trial", "a_ipc", "a_condensation", "a_discriminator", "a_few_shot", "a_cost"]
TABLES += ["b_main", "b_entropy", "b_ablation", "b_attack", "b_patience", "b_cost"]
FROM_RECORDS = [*TABLES, "datafree", "d_predict", "d_questions", "speed", "claims"]  # pages that read nothing but records
SMOKE = {  # every run notebook, tiny
    "run_teacher": "-p epochs 2 -p output runs/smoke/teacher.safetensors",
    "run_condense": "-p condenser herding -p ipc 2 -p epochs 2 -p steps 5",
    "run_kd": "-p condenser random -p epochs 3 -p steps 5 -p inversion_steps 3",
    "run_alignment": "-p condenser random -p epochs 3 -p steps 5 -p inversion_steps 3 -p alignments conditional,mmd",
    "run_surrogate": "-p surrogate noise -p images 200 -p epochs 2 -p steps 5",
    "run_boundary": "-p surrogate noise -p images 40 -p epochs 2 -p steps 5",
    "run_quality": "-p surrogate leaves -p images 100",
    "run_predict": "-p sources leaves,noise -p images 100 -p proxy_steps 8 -p epochs 1 -p steps 5",
    "run_import": "-p weights runs/smoke/teacher.safetensors -p output runs/smoke/imported.safetensors",
    "run_datafree": "-p teacher runs/smoke/teacher.safetensors -p sources fast,noise -p images 200 -p minutes 0.3"
    " -p proxy_steps 20 -p student wrn_10_1 -p output runs/smoke/made",
}

EXAMPLES = {  # every run notebook to read, on MNIST; the first is the README's main job
    "run_kd": "-p ipc 10 -p record reports/records/first-run-seed0.json",
    "run_condense": "-p ipc 1",
    "run_datafree": "-p teacher runs/mnist-wrn_16_1-0-0.safetensors -p dataset mnist5k",
} | dict.fromkeys(("run_alignment", "run_surrogate", "run_boundary", "run_quality", "run_teacher"), "")

CARDS, SHARE = int(config.get("cards", 1)), int(config.get("share", 1))
FREE = (  # a lock for each place on each card, held as long as the run lasts: a run takes the first that is free
    f"for g in $(seq 0 {CARDS * SHARE - 1}); do exec 9> runs/place$g.lock; "
    f"if flock -n 9; then export CUDA_VISIBLE_DEVICES=$((g % {CARDS})); break; fi; done; "
)
START = "set -o pipefail; mkdir -p runs/smoke; export MESA_SHADER_CACHE_DISABLE=true; "  # a program rendered once would compile for nothing
shell.prefix(START + (FREE if CARDS * SHARE > 1 else ""))
PAPERMILL = "papermill --no-progress-bar"
LOGGED = " > {log} 2>&1 || {{ echo '{rule} {wildcards} failed, {log} ends with:'; tail -n 3 {log}; exit 1; }}"
NEEDS = dict(gpu=int(NAME == "gpu"), mem_mb=8000, runtime=600)  # of a run: cards, MB, minutes


TINY = [f"runs/smoke/{name}.ipynb" for name in [*SMOKE, *(f"paper_{page}" for page in FROM_RECORDS)]]
DRAWN = [f"reports/paper_{page}.ipynb" for page in [*FROM_RECORDS, "a_images", "b_features"]]


rule all:
    input:
        TINY if NAME == "smoke" else DRAWN + [f"reports/{name}.ipynb" for name in EXAMPLES if NAME == "cpu"],


rule trial:
    input:
        [f"reports/records/{name}.json" for name in RUNS if "trial-" in name or "-ratio" in name],


def seconds_of(name):
    "How long a run took, by its record; None if there is none."
    path = Path(f"reports/records/{name}.json")
    if not path.exists():
        return None
    seconds = json.loads(path.read_text())["seconds"]
    return max(seconds.get("whole run", 0), sum(value for stage, value in seconds.items() if stage != "whole run"))


rule plan:  # what is there, what is missing, and how long it will take
    output:
        "reports/plan.md",
    run:
        groups = {}
        for name in RUNS:
            groups.setdefault(name.split("-seed")[0].split("-ratio")[0], []).append(name)
        known = {name: seconds_of(name) for name in RUNS}
        typical = lambda names: [known[name] for name in names if known[name] is not None]
        lines = ["# What is run, and how long it takes", "", f"`snakemake --profile profiles/{NAME} -f plan`. Hours of one core, by the records;", "for a run that is missing the mean of its like, or of its notebook's runs.", ""]
        lines += ["| runs | notebook | there | missing | hours so far | hours to come |", "| --- | --- | --- | --- | --- | --- |"]
        total = [0, 0]
        for group, names in groups.items():
            alike = typical(names) or typical([n for n in RUNS if RUNS[n][0] == RUNS[names[0]][0]])
            missing = [n for n in names if known[n] is None]
            took, left = sum(typical(names)) / 3600, len(missing) * sum(alike) / max(1, len(alike)) / 3600
            total = [total[0] + took, total[1] + left]
            lines += [f"| {group} | {RUNS[names[0]][0]} | {len(names) - len(missing)} | {len(missing)} | {took:.2f} | {left:.2f} |"]
        lines += [f"| all | | | | {total[0]:.1f} | {total[1]:.1f} |"]
        Path(output[0]).write_text("\n".join(lines) + "\n")


rule tiny:  # a run notebook, once
    input:
        lambda w: "runs/smoke/run_teacher.ipynb" if w.notebook in ("run_import", "run_datafree") else [],
    output:
        "runs/smoke/{notebook,run_.*}.ipynb",
    log:
        "runs/smoke/{notebook}.log",
    params:
        parameters=lambda w: SMOKE[w.notebook],
        data=lambda w: "" if w.notebook in ("run_import", "run_datafree") else "-p dataset digits",
    shell:
        PAPERMILL + " nbs/{wildcards.notebook}.ipynb {output} {params.data} {params.parameters} -p record runs/smoke/{wildcards.notebook}.json" + LOGGED


rule page:  # from the committed records
    output:
        "runs/smoke/paper_{page}.ipynb",
    log:
        "runs/smoke/paper_{page}.log",
    shell:
        PAPERMILL + " nbs/paper_{wildcards.page}.ipynb {output}" + LOGGED


rule records:  # of this scale
    input:
        expand("reports/records/{name}.json", name=RUNS),


rule table:  # drawn from all records that are there
    input:
        rules.records.input,
    output:
        "reports/paper_{table,(?!a_images|b_features).*}.ipynb",
    log:
        "runs/paper_{table}.log",
    shell:
        PAPERMILL + " nbs/paper_{wildcards.table}.ipynb {output} -p profile '{PREFIX}'" + LOGGED


rule example:
    input:
        lambda w: made_before(EXAMPLES[w.notebook]),
    output:
        "reports/{notebook,run_.*}.ipynb",
    log:
        "runs/{notebook}.log",
    params:
        parameters=lambda w: f"-p record reports/records/{w.notebook}.json {EXAMPLES[w.notebook]}",
    resources:
        **NEEDS,
    shell:
        PAPERMILL + " nbs/{wildcards.notebook}.ipynb {output} {params.parameters}" + LOGGED


rule features:
    output:
        "reports/paper_b_features.ipynb",
    log:
        "runs/paper_b_features.log",
    resources:
        **NEEDS,
    shell:
        PAPERMILL + " nbs/paper_b_features.ipynb {output} -p photographs {DATA} -p record reports/records/paper_b_features.json" + LOGGED


rule images:  # of the method that feature alignment changes most
    input:
        f"reports/records/{PREFIX}kd-pre_dfkd-{first}-dm10-seed0.json",
    output:
        "reports/paper_a_images.ipynb",
    log:
        "runs/paper_a_images.log",
    params:
        parameters=f"-p dataset {DATA} {SCALE['scale']} {networks(first)} -p inversion pre_dfkd",
    resources:
        **NEEDS,
    shell:
        PAPERMILL + " nbs/paper_a_images.ipynb {output} {params.parameters} -p record reports/records/paper_a_images.json" + LOGGED


rule photographs:  # of one thing: of ImageNet's class "school bus", as the paper takes photographs of aircraft
    output:
        directory("runs/photographs"),
    shell:
        "mkdir -p {output} && tar -xf {OTHER} -C {output} --strip-components=1 --wildcards '*/train/n04146614/*'"


rule hundred:  # every second class of an archive of class folders
    output:
        HUNDRED,
    run:
        with tarfile.open(OTHER) as archive, tarfile.open(output[0], "w") as half:
            members = [m for m in archive if m.isfile() and len(Path(m.name).parts) > 2]
            classes = sorted({Path(m.name).parent.name for m in members})[::2]
            if len(classes) < 2:
                raise ValueError("other must be an archive of FOLDER/CLASS/IMAGE, or FOLDER/train/CLASS/IMAGE")
            for m in members:
                if Path(m.name).parent.name in classes:
                    half.addfile(m, archive.extractfile(m))


def made_before(words):
    "The files among some parameters that another rule makes."
    return [word for word in words.split() if word.startswith("runs/")]


rule teacher:
    input:
        lambda w: made_before(teacher_run(w.bench, w.seed)),
    output:
        f"runs/{PREFIX}{{bench}}-teacher{{seed}}.safetensors",
    log:
        f"runs/{PREFIX}{{bench}}-teacher{{seed}}.log",
    params:
        parameters=lambda w: teacher_run(w.bench, w.seed),
        record=lambda w: f"reports/records/{PREFIX}trial-{w.bench}-teacher{w.seed}.json",
    resources:
        **NEEDS,
    shell:
        PAPERMILL + " nbs/run_teacher.ipynb runs/{PREFIX}{wildcards.bench}-teacher{wildcards.seed}.ipynb {params.parameters}"
        " -p output {output} -p record {params.record}" + LOGGED


rule mnist_teacher:
    output:
        "runs/mnist-{model}-{epochs}-{seed}.safetensors",
    log:
        "runs/mnist-{model}-{epochs}-{seed}.log",
    shell:
        PAPERMILL + " nbs/run_teacher.ipynb runs/mnist-{wildcards.model}-{wildcards.epochs}-{wildcards.seed}.ipynb -p model {wildcards.model}"
        " -p epochs {wildcards.epochs} -p seed {wildcards.seed} -p output {output} -p record {output}.json" + LOGGED


rule questions:  # which neither paper asks
    input:
        [f"reports/records/{name}.json" for name in RUNS if name.startswith(("weaker-", "labels-"))],


rule pool:  # quick where the run of that name is in the cache
    output:
        "runs/{name}/expanded.images.safetensors",
    log:
        "runs/{name}/pool.log",
    params:
        parameters=lambda w: RUNS[w.name][1],
    resources:
        **NEEDS,
    shell:
        PAPERMILL + " nbs/run_kd.ipynb runs/{wildcards.name}/pool.ipynb {params.parameters} -p arms expanded"
        " -p output runs/{wildcards.name} -p record runs/{wildcards.name}/pool.json" + LOGGED


def needed(name):
    "What a run needs, if its record is missing."
    return [] if Path(f"reports/records/{name}.json").exists() else made_before(RUNS[name][1])


rule record:
    input:
        lambda w: needed(w.name),
    output:
        "reports/records/{name}.json",
    log:
        "runs/{name}.log",
    params:
        notebook=lambda w: RUNS[w.name][0],
        parameters=lambda w: RUNS[w.name][1],
    resources:
        **NEEDS,
    shell:
        PAPERMILL + " nbs/{params.notebook}.ipynb runs/{wildcards.name}.ipynb {params.parameters} -p record {output}" + LOGGED
