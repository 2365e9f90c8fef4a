"""How to read the numbers of a page: what each question's answer means, and what it cannot tell."""

from __future__ import annotations

from collections.abc import Sequence

from ldm.report.page import Section, Text

# {words of a command: what its numbers mean}; the first that fits a command line counts.
EXPLANATIONS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("get_unc_synsets", "uncertainty classes", "uncertainty study"): (
        "Mutual information says, in nats, how much a sample would tell about which member drew it: 0 where all "
        "members draw the same, and at most the logarithm of the number of members, where each draws something of its"
        " own.",
        "Members are trained on bootstraps of the same pictures, so what they disagree about is what the pictures do "
        "not settle: classes with few pictures, as a rule. It is not the variety of the pictures of a class.",
        "Compare classes of one model: their order, and whether their intervals overlap. The size of the number "
        "depends on the resolution, on the first stage and on the number of members.",
        "The interval is over the noises of a class. It says how well the mean over noises is known for these "
        "members; other members would give other numbers.",
    ),
    ("get_unc_pixels", "uncertainty pixels"): (
        "Maps show where in the picture the members disagree: bright pixels are drawn differently by different "
        "members. All maps of a picture share one colour scale.",
    ),
    ("uncertainty mistakes",): (
        "A sample is recognised where a classifier of the training pictures takes it for the class that it was made "
        "for. The classifier errs too: compare with what it makes of real pictures that it was not trained on.",
    ),
    ("laplace sample", "laplace resample", "laplace sweep", "laplace filter", "laplace plots", "laplace fit"): (
        "The variance of a pixel says how much it would change had the last layer been trained on other pictures of "
        "the same law, for the same noise. It says nothing of layers below the last one.",
        "Filtering keeps the most certain images; the control beside it removes as many at random. What counts is the"
        " difference between the two, against its interval.",
    ),
    ("laplace filter",): (
        "A promise holds, with its confidence, for further samples of the same model and settings: of those below the "
        "threshold at most the promised share is bad. Bad is what the judge calls bad, its errors included.",
        "The score random knows nothing. A promise that it keeps as well is one that the samples need no score for.",
    ),
    ("attribute -",): (
        "Certainty is how much a sample's variance would rise without a training picture, over that variance; mean is "
        "how much its outputs would change. Both are exact for the last layer, with the features as they are.",
        "What the layers below would have learned without a picture only a training tells.",
    ),
    ("value -",): (
        "The fall is how much lower the held-out loss would be with more pictures of a class, after a refit of the "
        "last layer; the layers below would learn from more pictures, too. Compare it with the number of pictures that "
        "a class has, which costs nothing.",
    ),
    ("sample restore",): (
        "Of the pixels of further pictures at most the risk's share lies outside of the intervals on average, with the "
        "confidence over calibration sets. Any map keeps that; a better one does it with shorter intervals.",
    ),
    ("uncertainty ood",): (
        "AUROC is the probability that a picture of the folder scores above a known one: 0.5 where they are not told "
        "apart. Scores that ask no network stand beside the others: a score is worth what it adds to these.",
    ),
    ("evaluate trainings",): (
        "The band of the mean says how well the mean over trainings is known, the wider one where one more training "
        "would lie, from the same noises. A ratio below 1 says that trainings differ by less than another draw of as "
        "many samples would.",
    ),
    ("exposure",): (
        "Exposure bias is the distance between the noisy images that a network was trained on and those that it meets"
        " when it samples. Epsilon scaling divides the predicted noise by a factor above one to shrink that distance.",
    ),
    ("features",): (
        "A probe is a linear classifier on the network's features at one block and noise level. Its accuracy says "
        "what the features separate, not what the model draws well.",
    ),
    ("evaluate",): (
        "Distances such as FID shrink with the number of images, also between two samples of one law: compare only "
        "numbers with the same number of images, and look at the interval.",
    ),
    ("uncertainty toy",): (
        "In the plane the true information is known, so that estimates can be held against it: a good one follows the"
        " diagonal.",
    ),
}


def how_to_read(commands: Sequence[str]) -> Section:
    """Return what the numbers of these commands mean.

    Args:
        commands: command lines that made the results.
    """
    spoken = [" ".join(line.replace("python -m ldm", "decu").split()) for line in commands]
    found: list[str] = []
    for words, sentences in EXPLANATIONS.items():
        if any(word in line for word in words for line in spoken):
            found += [sentence for sentence in sentences if sentence not in found]
    found = found or ["The comments of each table say what its columns are; docs/glossary.md says what the words mean."]
    return Section("How to read this", [Text(sentence) for sentence in found])
