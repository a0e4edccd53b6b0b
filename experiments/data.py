"""The data that a command's options name: loaded, cleaned and split."""

from dataclasses import replace

from experiments.dataset import Dataset, Split, global_time_split, leave_one_out
from experiments.loaders import instants, load
from experiments.options import Job
from experiments.synthetic import synthetic


def split_of(options: Job) -> tuple[Dataset, Split]:
    """The data that the options name, and what of it is trained on and held out."""
    dataset = load_data(options)
    if options.split_times is None:
        return dataset, leave_one_out(dataset)
    return dataset, global_time_split(dataset, *instants(options.split_times))


def load_data(options: Job) -> Dataset:
    if options.data == "synthetic":
        asked = replace(options, preset=None, split_times=None).data_options()
        if asked:
            raise ValueError(f"`data` synthetic is generated and takes no {asked}.")
        return synthetic()
    return load(
        options.data,
        format=options.data_format,
        encoding=options.encoding or "utf-8",
        columns=options.columns,
        min_rating=options.min_rating,
        repeats=options.repeats,
        k_core=options.k_core,
        items=options.items,
    )
