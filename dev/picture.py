"""picture.py WIDTH SCREEN…: an SVG of terminals, one below the other, from what `tmux capture-pane -e` wrote.

It has its own background, so it can be read on a light page and on a dark one, and asks for no font from elsewhere.
"""

import os
import sys

from rich.console import Console
from rich.text import Text

#: What Rich makes of a text, in the order of TERMINAL's fields.
FIELDS = 'terminal_width', 'terminal_height', 'char_height', 'styles', 'lines', 'backgrounds', 'matrix'
SEPARATOR = '\0'
TERMINAL = """<svg y="%(y)d" width="%(width)d" height="%(height)d">
<style>
.t%(number)d-matrix { font: %(char_height)spx ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace }
%(styles)s
</style>
<defs>%(lines)s</defs>
<rect width="%(width)d" height="%(height)d" rx="8" fill="#292929"/>
<g transform="translate(%(margin)d, %(margin)d)">%(backgrounds)s
<g class="t%(number)d-matrix">%(matrix)s</g>
</g>
</svg>"""

#: Around the text of a terminal, and between two terminals.
MARGIN, GAP = 14, 12


def svg(text, width, number):
    """Rich's parts of the SVG of a text with escape sequences."""
    with open(os.devnull, 'w', encoding='utf-8') as nowhere:
        console = Console(record=True, width=width, file=nowhere, force_terminal=True, color_system='truecolor')
        for line in text.split('\n'):
            console.print(Text.from_ansi(line), no_wrap=True, overflow='crop', highlight=False)
    made = console.export_svg(title='', unique_id='t%d' % number,
                              code_format=SEPARATOR.join('{%s}' % field for field in FIELDS))
    return dict(zip(FIELDS, made.split(SEPARATOR)), number=number, margin=MARGIN)


def main():
    y, terminals = 0, []
    for number, name in enumerate(sys.argv[2:]):
        with open(name, encoding='utf-8') as file:
            part = svg(file.read().rstrip(), int(sys.argv[1]), number)
        width = int(float(part['terminal_width'])) + 2 * MARGIN
        height = int(float(part['terminal_height'])) + 2 * MARGIN
        terminals.append(TERMINAL % dict(part, y=y, width=width, height=height))
        y += height + GAP
    print('<svg xmlns="http://www.w3.org/2000/svg" xml:space="preserve" viewBox="0 0 %d %d">' % (width, y - GAP))
    print('<title>rbd-offload request --wait, and rbd-offload jobs, while an image is copied and afterwards</title>')
    print('\n'.join(terminals))
    print('</svg>')


if __name__ == '__main__':
    main()
