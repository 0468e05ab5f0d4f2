/** Pictures in the terminal, where it can show them. */
import { type RgbImage, shrinkImage } from './image.ts';
import { encodePng } from './png.ts';

/**
 * How a terminal shows pictures: the graphics protocol of kitty (https://sw.kovidgoyal.net/kitty/graphics-protocol/),
 * the inline images of iTerm2 (https://iterm2.com/documentation-images.html), two pixels in every character, or not.
 */
export type TerminalGraphics = 'kitty' | 'iterm2' | 'half-blocks' | 'none';

/** Names in `TERM_PROGRAM` (`LC_TERMINAL` through ssh) of terminals that know a protocol. */
const programs: Readonly<Record<string, TerminalGraphics>> = {
  ghostty: 'kitty',
  'iTerm.app': 'iterm2',
  iTerm2: 'iterm2',
  WezTerm: 'iterm2',
  mintty: 'iterm2',
};

/**
 * What the terminal says of itself in its environment; nothing is asked of it.
 * @param isTTY whether the output is a terminal at all
 */
export function terminalGraphics(
  environment: Readonly<Record<string, string | undefined>>,
  isTTY: boolean,
): TerminalGraphics {
  const {
    TERM = '',
    TERM_PROGRAM = '',
    LC_TERMINAL = '',
    KITTY_WINDOW_ID,
    COLORTERM = '',
    NO_COLOR,
    TMUX,
  } = environment;
  if (!isTTY || TERM === 'dumb') return 'none';
  // Multiplexers inherit the variables of the terminal around them but do not pass its pictures on.
  const isMultiplexed = TMUX || /^(tmux|screen)/.test(TERM);
  if (!isMultiplexed) {
    if (KITTY_WINDOW_ID || TERM === 'xterm-kitty' || TERM === 'xterm-ghostty') return 'kitty';
    const known = programs[TERM_PROGRAM] ?? programs[LC_TERMINAL];
    if (known) return known;
  }
  return /^(truecolor|24bit)$/i.test(COLORTERM) && !NO_COLOR ? 'half-blocks' : 'none';
}

export interface TerminalSize {
  /** Characters in a line; default 80. */
  readonly columns?: number;
  /** Lines; default 24. */
  readonly rows?: number;
}

/** Lines left free for what else is to be seen. */
const FREE_ROWS = 2;

/** Picture pixels that take the width of a character where the terminal draws the picture itself. */
const PIXELS_PER_COLUMN = 8;

/** A character is about twice as high as wide. */
const CELL_ASPECT = 2;

/**
 * The characters and control sequences that show a picture, a line end last; empty for `none`. The picture is made
 * smaller to fit and never drawn larger than its pixels.
 */
export function terminalPicture(
  graphics: TerminalGraphics,
  image: RgbImage,
  { columns = 80, rows = 24 }: TerminalSize = {},
): string {
  const pixelsPerColumn = graphics === 'half-blocks' ? 1 : PIXELS_PER_COLUMN;
  const highest = Math.max(rows - FREE_ROWS, 1);
  const widestByRows = (highest * CELL_ASPECT * image.width) / image.height;
  const width = Math.max(Math.floor(Math.min(columns, image.width / pixelsPerColumn, widestByRows)), 1);
  switch (graphics) {
    case 'kitty':
      return kittyPicture(encodePng(image), width);
    case 'iterm2':
      return iterm2Picture(encodePng(image), width);
    case 'half-blocks':
      return halfBlocks(shrinkImage(image, width, Math.max(Math.round((width * image.height) / image.width), 1)));
    case 'none':
      return '';
  }
}

const ESCAPE = '\u001b';
const BELL = '\u0007';

/** Longest piece of base64 in one kitty sequence; all but the last have a multiple of 4. */
const KITTY_CHUNK = 4096;

/** Sent and shown at once (a=T), as PNG (f=100), as many columns wide (c), without an answer (q=2), in pieces (m). */
function kittyPicture(png: Uint8Array, columns: number): string {
  const payload = Buffer.from(png).toString('base64');
  let sequences = '';
  for (let at = 0; at < payload.length; at += KITTY_CHUNK) {
    const more = at + KITTY_CHUNK < payload.length ? 1 : 0;
    const controls = at === 0 ? `a=T,f=100,c=${columns},q=2,m=${more}` : `m=${more}`;
    sequences += `${ESCAPE}_G${controls};${payload.slice(at, at + KITTY_CHUNK)}${ESCAPE}\\`;
  }
  return `${sequences}\n`;
}

function iterm2Picture(png: Uint8Array, columns: number): string {
  const payload = Buffer.from(png).toString('base64');
  return `${ESCAPE}]1337;File=inline=1;size=${png.length};width=${columns};preserveAspectRatio=1:${payload}${BELL}\n`;
}

/** Upper half blocks: the character's colour is the upper pixel, its background the lower one. */
function halfBlocks({ width, height, data }: RgbImage): string {
  const colour = (x: number, y: number) => data.subarray(3 * (y * width + x), 3 * (y * width + x) + 3).join(';');
  let text = '';
  for (let y = 0; y < height; y += 2) {
    for (let x = 0; x < width; x++) {
      const lower = y + 1 < height ? `${ESCAPE}[48;2;${colour(x, y + 1)}m` : `${ESCAPE}[49m`;
      text += `${ESCAPE}[38;2;${colour(x, y)}m${lower}▀`;
    }
    text += `${ESCAPE}[0m\n`;
  }
  return text;
}

/**
 * Shows a picture on a terminal that can.
 * @param output default: the standard output
 * @returns whether it did
 */
export function showPicture(image: RgbImage, output: NodeJS.WriteStream = process.stdout): boolean {
  const graphics = terminalGraphics(process.env, output.isTTY);
  if (graphics === 'none') return false;
  output.write(terminalPicture(graphics, image, { columns: output.columns, rows: output.rows }));
  return true;
}
