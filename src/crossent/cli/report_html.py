"""HTML pieces that the report's sections share. Every cell is escaped here."""

from html import escape


def percent(share: float) -> str:
    """Return a share as a percentage with no-break spaces; "100 %" and "0 %" only if exact.

    Examples
    --------
    >>> [percent(share).replace("\N{NO-BREAK SPACE}", " ") for share in (0.9722, 0.99999, 1.0, 0.0)]
    ['97.2 %', '> 99.9 %', '100 %', '0 %']
    """
    if share in (0, 1):
        text = f"{100 * share:.0f}"
    elif 0.0005 <= share <= 0.9995:
        text = f"{100 * share:.1f}"
    else:
        text = "> 99.9" if share > 0.5 else "< 0.1"
    return f"{text} %".replace(" ", "\N{NO-BREAK SPACE}")


def table(
    caption: str, header: list[str], rows: list[list[str]], text_columns: tuple[int, ...] = ()
) -> str:
    """Return a table whose first column heads its rows; text columns are set to the left."""
    kind = ['class="text" ' if column in text_columns else "" for column in range(len(header))]
    kind[0] = 'class="text" '
    head = "".join(
        f'<th {kind[column]}scope="col">{escape(name)}</th>' for column, name in enumerate(header)
    )
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(
            f"<td {kind[column]}>".replace(" >", ">") + f"{escape(row[column])}</td>"
            for column in range(1, len(row))
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<table class="wide"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def scrollable(label: str, content: str) -> str:
    """Return content that scrolls sideways on a narrow screen, by keyboard too."""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">'
        f"{content}</div>"
    )
