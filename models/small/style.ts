/**
 * `npm run style`: trains the LoRA of `line-drawings.yaml`, and draws objects that it was not shown at strengths 0, 0.5
 * and 1, from its file in kohya's layout and in diffusers'.
 */

import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import sharp from 'sharp';
import { load, readLora } from '../../src/index.node.ts';
import { main } from './command.ts';
import { NEW_STYLE, NEW_STYLE_OBJECTS } from './data/new-style.ts';
import { CACHE, FOLDER, MODEL_FILE } from './paths.ts';
import { preparePictures } from './prepare.ts';

const STRENGTHS = [0, 0.5, 1];
/** Objects of the sheet's that are not among the twenty, in styles that the captions of the twenty do not name, too. */
const PROMPTS = [
  'flat fox on a white background',
  'flat watermelon on a white background',
  'flat sailboat on a white background',
  'flat castle on a white background',
  '3d turtle on a white background',
  'flat guitar on a yellow background',
];

await preparePictures();
await main(['train', join(FOLDER, 'line-drawings.yaml')]);
const kohya = join(CACHE, NEW_STYLE, 'stages/01-lora', `${NEW_STYLE}.safetensors`);
const diffusers = join(CACHE, NEW_STYLE, `${NEW_STYLE}-diffusers.safetensors`);
await main(['lora', 'convert', kohya, '--format', 'diffusers', '-o', diffusers]);

const unseen = PROMPTS.filter((prompt) => !NEW_STYLE_OBJECTS.some((name) => prompt.includes(name)));
if (unseen.length < PROMPTS.length) throw new Error('A prompt has an object that the LoRA was shown.');
const sd = await load(MODEL_FILE, { device: 'cpu' });
const side = sd.defaults.width;
const rows: Uint8Array[][] = [];
let largest = 0;
for (const strength of STRENGTHS) {
  const drawn: Uint8Array[][] = [];
  for (const file of [kohya, diffusers]) {
    const lora = await readLora(file);
    const row: Uint8Array[] = [];
    for (const [seed, prompt] of PROMPTS.entries()) {
      const [image] = await sd.generate({ prompt, seed, loras: [{ lora, strength }] });
      row.push(image!.data);
    }
    drawn.push(row);
  }
  const [first, second] = drawn as [Uint8Array[], Uint8Array[]];
  for (const [i, data] of first.entries()) {
    for (let j = 0; j < data.length; j++) largest = Math.max(largest, Math.abs(data[j]! - second[i]![j]!));
  }
  rows.push(first);
}
await sd.dispose();
const tiles = rows.flatMap((row, y) =>
  row.map((data, x) => ({
    input: Buffer.from(data),
    raw: { width: side, height: side, channels: 3 as const },
    left: x * side,
    top: y * side,
  })),
);
await mkdir(join(FOLDER, 'style'), { recursive: true });
const canvas = {
  width: PROMPTS.length * side,
  height: STRENGTHS.length * side,
  channels: 3 as const,
  background: '#fff',
};
await sharp({ create: canvas })
  .composite(tiles)
  .png()
  .toFile(join(FOLDER, 'style', 'strengths.png'));
console.log(`Both files give the same pictures, up to ${largest} of 255.`);
