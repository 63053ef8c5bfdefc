"""The time of a gradient by the number of steps, from RESULTS.md."""

from matplotlib.figure import Figure

from drawings._shapes import table

CELLS = ["GRU", "LSTM", "MinGRU", "SRU", "HGRN", "RGLRU", "LRU", "S5", "S6"]


def draw():
    rows = table("Linear recurrences", "T | GRU | LSTM | MinGRU | MinLSTM | MinGRU in logs")
    rows = [row for row in rows if row["T"].isdigit()]
    steps = [int(row["T"]) for row in rows]
    figure = Figure(figsize=(6.3, 2.8), layout="constrained")
    axes = figure.subplots()
    for k, cell in enumerate(CELLS):
        axes.plot(steps, [float(row[cell]) for row in rows], ls="--" if k < 2 else "-", marker="o", label=cell)
    axes.set_xscale("log", base=4)
    axes.set_yscale("log")
    axes.set_xticks(steps, [f"{each:,}" for each in steps])
    axes.set_xlabel("steps")
    axes.set_ylabel("ms")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
