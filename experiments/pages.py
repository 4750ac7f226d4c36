"""The page of a data set's results: every table, made from its rows, recipes, certificates and studies."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from experiments import paper_tables, results
from experiments.catalogue import KINDS, ball
from experiments.paper_tables import Row, Rows, Table, text
from experiments.provenance import joined
from experiments.recipes import RECIPES
from experiments.report import format_table
from experiments.results import BETA2, PAPER, UNION, WORST, column_title
from rbf_jax import PRESETS

_IN_PAPER = PAPER["settings"]["linf_eps"]


class Section(NamedTuple):
    """A table with its heading and what is said of it."""

    heading: str
    text: str
    table: Table


def sections(
    job: dict[str, Any], recipes: dict[str, dict[str, Any]], rows: list[Row], more: list[Section]
) -> list[Section]:
    """All tables of a data set.

    Args:
        job: what `experiments.reproduce` wrote of itself.
        recipes: of the models.
        rows: of `results.make_rows`.
        more: tables of certificates and studies.
    """
    data_set, found = job["config"]["set"], []
    if data_set in _IN_PAPER:
        by_name = Rows(rows, job["config"]["beta2"])
        for number, (title, make) in paper_tables.TABLES.items():
            found.append(Section(f"Table {number}: {title}", _ON_TABLES.get(number, ""), make(data_set, by_name)))
        times = paper_tables.training_time(data_set, recipes, job["seconds"])
        found.insert(1, Section("Table II: Training time", _ON_TIMES, times))
        found.append(Section("Worst cases", _ON_WORST, paper_tables.unions(by_name)))
        budgets = dict.fromkeys((row["norm"], row["epsilon"]) for row in rows if row["norm"])
        for norm, epsilon in budgets:
            found.append(Section(f"Every attack, {ball(norm, epsilon)}", "", every_attack(rows, norm, epsilon)))
    else:
        found.append(Section("Accuracy", "", results.table(rows)))
    took = Section("Seconds", _ON_SECONDS, paper_tables.seconds(Rows(rows)))
    found += [*more, Section("The models", _ON_MODELS, trained(recipes)), took]
    return [section for section in found if section.table[1]]


_BLACK_BOX = (
    "Black box: crafted on our CNN. What such an attack leaves of the CNN itself stands under 'Every attack'; where it "
    "leaves most of it, as with smoothed labels, it says little of other models."
)
_ON_TABLES = {
    "I": f"{_BLACK_BOX} SPSA queries the model itself.",
    "V, l1": _BLACK_BOX,
    "V, l2": _BLACK_BOX,
    "III": "The lowest of several attacks on other images is too low by chance where they are few. The worst case is "
    "that of the most attacks under 'Worst cases', or of more images that fewer leave nothing of. It may lie above the "
    "lowest attack where its N is smaller, as it is of fewer images, and for noisy models, as other redraws score it.",
    "IV": "The lowest of several attacks on other images is too low by chance where they are few. Beyond the budget "
    "the paper's Madry met PGD alone. Ours met few attacks there as well ('Every attack' says which), so that what PGD "
    "leaves is not what is left: see 'Accuracy against epsilon'.",
    "VII": "AutoAttack's rand version and the adaptive suite are under 'Every attack'. A lower level that met fewer "
    "attacks looks more robust than it is.",
}
_ON_TIMES = (
    "Overhead: the EM and, for CNN+ and rCNN+, the noise bank. The last column but one scales our seconds to the "
    "paper's epochs. Our seconds are of the device above, the paper's of a GTX 1080 Ti: only the ratios between "
    "models compare, those only where no other work shared the device, and Madry's only at the attack steps of Madry "
    "et al. (40 on MNIST, 7 on CIFAR-10): with fewer an epoch is so much shorter."
)
_ON_WORST = (
    "Per example, the worst of the attacks, on the images that met them all. Few attacks met many images, and all of "
    "them few: each line of a budget goes on to fewer images and more attacks, and the last is what counts; but where "
    "an earlier one leaves nothing, no further attack could. AutoAttack's own Square keeps to a schedule of 10,000 "
    "queries and stops at 5,000; alone, with a schedule of its own, Square may leave less."
)
_ON_SECONDS = (
    "What each attack took: crafting and, in all forms, scoring (a transferred attack's crafting is that on its "
    "source), on the devices named above, some shared with other work, and on as many images as the tables say; a dash "
    "where they did not meet."
)
_ON_MODELS = (
    "Training accuracy: of the steps' batches, with dropout and noise; Madry's and rCNN-AT's on attacked images. "
    "Attack steps: of PGD on each batch. Madry et al. took 40 on MNIST and 7 on CIFAR-10; one from a random start is "
    "the fast variant (Wong et al. 2020)."
)


def every_attack(rows: list[Row], norm: str, epsilon: float) -> Table:
    """Every model under every attack of one budget."""
    within = [row for row in rows if (row["norm"], row["epsilon"]) == (norm, epsilon) and row["attack"] != WORST]
    order, by_name = [*KINDS], Rows(rows)
    within.sort(key=lambda row: (row["source"] != row["model"], order.index(row["attack"])))
    titles = list(dict.fromkeys(row["title"] for row in within))
    headings, lines = ["model", "clean", *titles], []
    for model in (name for name in RECIPES if any(row["model"] == name for row in within)):
        for form in dict.fromkeys(row["scored_on"] for row in within if row["model"] == model):
            line = dict.fromkeys(headings, "–") | {"model": column_title(model, form)}
            line["clean"] = text(by_name.find(model, "clean", "", 0.0, form))
            line |= {r["title"]: text(r) for r in within if (r["model"], r["scored_on"]) == (model, form)}
            lines.append(line)
    return headings, lines


def trained(recipes: dict[str, dict[str, Any]]) -> Table:
    """How the models were trained, and how well they learned."""
    headings = [
        *("model", "epochs", "attack steps", "seconds an epoch", "on"),
        *("training accuracy", "validation accuracy"),
    ]
    lines = []
    for name in (name for name in RECIPES if name in recipes):
        recipe = recipes[name]
        history, steps = recipe["history"], recipe["config"]["adversarial"]["steps"] if RECIPES[name].adversarial else 0
        values = (
            RECIPES[name].title,
            str(len(history["loss"])),
            str(steps),
            "–" if recipe["seconds an epoch"] is None else str(recipe["seconds an epoch"]),
            f"{recipe['device']}, {recipe['cores']} cores",
            f"{100 * history['accuracy'][-1]:.2f}",
            f"{100 * history['validation'][-1]:.2f}",
        )
        lines.append(dict(zip(headings, values, strict=True)))
    return headings, lines


_WHO = (
    (("cnn",), "CNN: the plain network."),
    (
        ("rcnn",),
        "rCNN: the same behind the RBF front end; 'no noise' is that front end alone (beta2 = 0), else a prediction "
        "averages noisy draws.",
    ),
    (
        ("cnn_plus", "rcnn_plus"),
        "CNN+ and rCNN+ were trained on noisy images too (Gaussian noise and a bank of PGD's).",
    ),
    (("madry",), "Madry: adversarial training without the front end (attack steps: 'The models' in `README.md`)."),
    (("rcnn_at",), "rCNN-AT: adversarial training through it."),
    (("rcnn_long",), "'Long' was trained for more epochs."),
    (("threshold",), "Threshold: before the network pixels become 0 or 1."),
    (("mean",), "3x3 mean: before the network every pixel becomes the mean around it."),
    (("kmeans",), "k-means codebook: an rCNN whose filters are of k-means instead of the EM."),
    (("cnn_hard", "rcnn_hard"), "'Hard labels': trained without label smoothing (0.1 elsewhere)."),
    (("gaussian_02", "gaussian_03"), "'Gaussian': trained on images with noise of that standard deviation."),
    (("rcnn_v2", "rcnn_paper"), "Presets are other readings of the sharpness beta1."),
    (("rcnn_released",), "'Released filters' are those of the paper's authors."),
    (("rcnn_seed1", "cnn_plus_seed1"), "A seed is that of a model's training."),
)


def who(models: Iterable[str]) -> str:
    """Who is who among these models, for both pages."""
    present = {*models}
    return " ".join(said for names, said in _WHO if present.intersection(names))


def trained_for(data_set: str, recipes: dict[str, dict[str, Any]]) -> str:
    """How long the models were trained, beside the paper's."""
    ours, paper = dict[int, list[str]](), []
    for name in (name for name in RECIPES if name in recipes):
        ours.setdefault(len(recipes[name]["history"]["loss"]), []).append(RECIPES[name].title)
        if times := PAPER["table2_training_time"]["rows"].get(f"{data_set}/{name}"):
            paper.append(f"{RECIPES[name].title} for {times[0]}")
    trained = [f"{epochs} epochs: {'; '.join(ours[epochs])}." for epochs in sorted(ours, reverse=True)]
    return " ".join(["Trained for", *trained, *([f"The paper trained {', '.join(paper)}."] if paper else [])])


def note(config: dict[str, Any]) -> str:
    """What the table's numbers are."""
    attack = config["attack"]
    settings = attack["settings"]
    beta1 = PRESETS[config["preset"]]
    other = "" if config["beta2"] == BETA2 else f" (the paper's numbers beside it are at {BETA2:g})"
    behind = "; in brackets behind the paper's number the difference, ours minus the paper's"
    return (
        f"Accuracy in percent with its 95 % Wilson interval{behind if config['set'] in _IN_PAPER else ''}. rCNN: mean "
        f"of {config['draws']} noisy draws at beta2 = {config['beta2']:g}{other} and beta1 = {beta1.test:.2f} "
        f"({beta1.train:.2f} in training), scored on {attack['scoring']} fresh redraws (on one, where there are more "
        f"than {attack['redrawn']} images). Attacks, but for the adaptive ones, are crafted without noise; PGD from "
        f"{settings['pgd']['restarts']} random start(s) with steps of 2.5 epsilon / steps, CW in linf as PGD on its "
        "margin loss. CW in l2, EAD and AutoAttack stop where the model without noise errs: at its boundary, from "
        "where noise may bring images back, so that beside PGD they look weak against noisy models; where it never "
        "errs, those meet the image of AutoAttack's first part (up to commit ad0e68d the clean one). BPDA+EoT "
        f"({settings['bpda_eot']['draws']} draws x {settings['bpda_eot']['steps']} steps) is crafted with noise from "
        "where PGD without noise ended. A worst case is per example: its worst attack is picked on "
        f"{attack['selection']} other redraws. The paper says nothing of steps, restarts and losses. Stronger attacks "
        "leave less."
    )


def origin(job: dict[str, Any], rows: list[Row]) -> str:
    """Where the numbers come from."""
    config = job["config"]
    commits, met = joined(row["commit"] for row in rows), [row for row in rows if row["attack"] not in (WORST, UNION)]
    places = "; ".join(sorted({f"{row['device']}, {row['cores']} cores, jax {row['jax']}" for row in met}))
    made = ("source", "attack", "norm", "epsilon", "crafted_on", "examples", "leaving")
    attacked = {tuple(row.get(key) for key in made): row for row in rows}
    seconds = sum(row.get("crafting seconds", 0) for row in attacked.values())
    seconds += sum(row.get("scoring seconds", 0) for row in rows)
    return (
        f"Profile {config['profile']}, seed {config['seed']}, commit {commits}, {places}; {job['filters']} filters; "
        f"attacks and scoring took {seconds:.0f} s."
    )


def page(job: dict[str, Any], found: list[Section], rows: list[Row], figures: list[dict[str, str]]) -> str:
    """The Markdown page of a data set's results; of figures what `figures.save` wrote."""
    models = who(row["model"] for row in rows)
    parts = [f"# {job['config']['title']}", models, note(job["config"]), origin(job, rows)]
    for heading, said, (headings, lines) in found:
        parts += [f"## {heading}", *([said] if said else []), format_table(headings, lines)]
    for figure in figures:
        parts += [f"## {figure['heading']}", figure["text"], f"![{figure['alt']}](figures/{figure['file']})"]
    parts.append(
        "Made by `make tables` from `ledger/`, `models/`, `certificates/`, `studies/`, `figures/` and `job.json`; "
        "`results.json` has every figure with its deviation over redraws and its seconds.\n"
    )
    return "\n\n".join(parts)
