import { describe, expect, test } from 'vitest';
import type { RgbImage } from '../../src/image/image.ts';
import { decodePng } from '../../src/image/png.ts';
import { terminalGraphics, terminalPicture } from '../../src/image/terminal.node.ts';
import { torchGenerator } from '../../src/sampling/noise.ts';

describe('what a terminal can show', () => {
  test.each([
    [{ KITTY_WINDOW_ID: '1', TERM: 'xterm-256color' }, 'kitty'],
    [{ TERM: 'xterm-kitty' }, 'kitty'],
    [{ TERM: 'xterm-ghostty', TERM_PROGRAM: 'ghostty' }, 'kitty'],
    [{ TERM_PROGRAM: 'iTerm.app', TERM: 'xterm-256color' }, 'iterm2'],
    [{ LC_TERMINAL: 'iTerm2' }, 'iterm2'],
    [{ TERM_PROGRAM: 'WezTerm' }, 'iterm2'],
    [{ COLORTERM: 'truecolor', TERM: 'xterm-256color' }, 'half-blocks'],
    [{ COLORTERM: '24bit', TERM_PROGRAM: 'vscode' }, 'half-blocks'],
    [{ KITTY_WINDOW_ID: '1', TMUX: '/tmp/tmux', TERM: 'tmux-256color', COLORTERM: 'truecolor' }, 'half-blocks'],
    [{ KITTY_WINDOW_ID: '1', TERM: 'screen' }, 'none'],
    [{ COLORTERM: 'truecolor', NO_COLOR: '1' }, 'none'],
    [{ TERM: 'dumb', COLORTERM: 'truecolor' }, 'none'],
    [{ TERM: 'xterm-256color' }, 'none'],
    [{}, 'none'],
  ] as const)('%j: %s', (environment, expected) => {
    expect(terminalGraphics(environment, true)).toBe(expected);
    expect(terminalGraphics(environment, false)).toBe('none');
  });
});

describe('pictures for the terminal', () => {
  const noise = (width: number, height: number): RgbImage => ({
    width,
    height,
    data: Uint8Array.from(torchGenerator(0).integers(0, 256, 3 * width * height)),
  });

  test('kitty: the PNG in pieces of 4096 characters, the last one marked', () => {
    const image = noise(64, 64);
    const text = terminalPicture('kitty', image);
    // biome-ignore lint/suspicious/noControlCharactersInRegex: control sequences are what is tested
    const pieces = [...text.matchAll(/\u001b_G([^;]*);([^\u001b]*)\u001b\\/g)];
    expect(pieces.length).toBeGreaterThan(2);
    expect(pieces.map(([sequence]) => sequence).join('')).toBe(text.trimEnd());
    expect(pieces[0]![1]).toBe('a=T,f=100,c=8,q=2,m=1');
    expect(pieces.slice(1).map(([, controls]) => controls)).toEqual([...pieces.slice(2).map(() => 'm=1'), 'm=0']);
    expect(pieces.slice(0, -1).every(([, , payload]) => payload!.length === 4096)).toBe(true);
    expect(decodePng(Buffer.from(pieces.map(([, , payload]) => payload).join(''), 'base64'))).toEqual(image);
  });

  test('iTerm2: one sequence with the size of the file', () => {
    const image = noise(32, 16);
    // biome-ignore lint/suspicious/noControlCharactersInRegex: control sequences are what is tested
    const match = /^\u001b\]1337;File=inline=1;size=(\d+);width=4;preserveAspectRatio=1:([^\u0007]*)\u0007\n$/.exec(
      terminalPicture('iterm2', image),
    );
    const png = Buffer.from(match![2]!, 'base64');
    expect(png).toHaveLength(Number(match![1]));
    expect(decodePng(png)).toEqual(image);
  });

  test('half blocks: two pixels in a character, an odd last line on the own background', () => {
    const image = { width: 1, height: 3, data: Uint8Array.of(1, 2, 3, 4, 5, 6, 7, 8, 9) };
    expect(terminalPicture('half-blocks', image)).toBe(
      '\u001b[38;2;1;2;3m\u001b[48;2;4;5;6m▀\u001b[0m\n\u001b[38;2;7;8;9m\u001b[49m▀\u001b[0m\n',
    );
  });

  test.each([
    [512, 512, 44, 22],
    [1024, 128, 80, 5],
    [128, 1024, 5, 20],
    [16, 16, 16, 8],
  ])('a picture of %i x %i fits into 80 columns and 24 lines as %i x %i', (width, height, columns, lines) => {
    const text = terminalPicture('half-blocks', noise(width, height), { columns: 80, rows: 24 });
    const rows = text.trimEnd().split('\n');
    expect(rows).toHaveLength(lines);
    expect(rows.every((row) => row.split('▀').length - 1 === columns)).toBe(true);
  });

  test('large pictures are scaled to the terminal by the protocols too', () => {
    expect(terminalPicture('kitty', noise(1000, 100), { columns: 60, rows: 30 })).toContain('c=60,');
    expect(terminalPicture('iterm2', noise(400, 400), { columns: 200, rows: 12 })).toContain('width=20;');
  });

  test('none is nothing', () => {
    expect(terminalPicture('none', noise(2, 2))).toBe('');
  });
});
