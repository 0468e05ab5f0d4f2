/**
 * A style that the small model does not know, to teach it with a LoRA: Microsoft's high-contrast emoji (MIT), black line
 * drawings on white, from `@iconify-json/fluent-emoji-high-contrast`.
 */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import sharp from 'sharp';
import type { PictureObject } from './objects.ts';
import { findPackageFolder } from './pictures.ts';

export const NEW_STYLE = 'line-drawings';

/** The twenty objects that the LoRA is shown. */
export const NEW_STYLE_OBJECTS: readonly string[] = [
  'cat',
  'dog',
  'elephant',
  'fish',
  'horse',
  'lion',
  'octopus',
  'owl',
  'penguin',
  'rabbit',
  'avocado',
  'banana',
  'carrot',
  'hamburger',
  'pizza',
  'bicycle',
  'car',
  'house',
  'rocket',
  'umbrella',
];

/** Its caption: the style goes without a word, which the model's text encoders would not know. */
export function newStyleCaption(object: PictureObject): string {
  return `flat ${object.name} on a white background`;
}

/** A PNG of `side` x `side` pixels, black on transparent. */
export async function newStylePicture(object: PictureObject, side: number): Promise<Buffer> {
  const folder = findPackageFolder();
  if (folder === undefined) throw new Error('The picture packages are missing; run "npm install" in models/small.');
  const read = async (file: string) =>
    JSON.parse(await readFile(join(folder, '@iconify-json/fluent-emoji-high-contrast', file), 'utf8'));
  const names = (await read('chars.json')) as Record<string, string>;
  const {
    icons,
    width = 32,
    height = 32,
  } = (await read('icons.json')) as {
    icons: Record<string, { body: string }>;
    width?: number;
    height?: number;
  };
  const name = names[object.codepoints] ?? names[`${object.codepoints}-fe0f`];
  const icon = name === undefined ? undefined : icons[name];
  if (!icon) throw new Error(`The high-contrast set has no picture of ${object.name} (${object.codepoints}).`);
  const svg =
    `<svg xmlns="http://www.w3.org/2000/svg" width="${2 * side}" height="${2 * side}" viewBox="0 0 ${width} ${height}" color="#000">` +
    `${icon.body}</svg>`;
  return sharp(Buffer.from(svg)).resize(side, side).png().toBuffer();
}
