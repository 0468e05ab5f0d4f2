/**
 * Shows and measures what the model learned: the sheet of 64 prompts as one picture, and how often the nearest
 * training picture is of the object that was asked for.
 */

import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import sharp from 'sharp';
import { tensorFromImage } from '../../src/image/image.ts';
import { load } from '../../src/index.node.ts';
import type { GeneratedImage } from '../../src/pipeline/pipeline.ts';
import { canonicalPrompt } from './data/captions.ts';
import { SHEET, SHEET_COLUMNS } from './data/held-out.ts';
import { buildLibrary, rankObjects, rankOf } from './data/nearest.ts';
import { OBJECTS } from './data/objects.ts';
import { loadPictures } from './data/pictures.ts';
import { CACHE, FOLDER, MODEL_FILE } from './paths.ts';

export interface SheetOptions {
  model?: string;
  /** Side in pixels (default the model's). */
  size?: number;
  /** Guidance scales to measure (default 1, none, and the model's). */
  scales?: readonly number[];
  steps?: number;
  folder?: string;
}

interface Score {
  readonly size: number;
  readonly cfg: number;
  readonly pictures: number;
  readonly top1: number;
  readonly top5: number;
  readonly heldOut: { readonly pictures: number; readonly top1: number; readonly top5: number };
}

/** Draws the sheet with each guidance scale; writes `sheet.png`, without guidance `sheet-unguided.png`, and `sheet.json`. */
export async function drawSheet(options: SheetOptions = {}): Promise<void> {
  const { model = MODEL_FILE, folder = join(FOLDER, 'sheet') } = options;
  await mkdir(folder, { recursive: true });
  // One device, so that the figures can be repeated.
  const sd = await load(model, { device: 'cpu' });
  const { size = sd.defaults.width, scales = [1, sd.defaults.cfg], steps = sd.defaults.steps } = options;
  const pictures = await loadPictures({ size, cacheFolder: CACHE });
  const scores: Score[] = [];
  for (const cfg of scales) {
    const images: GeneratedImage[] = [];
    const ranks: number[] = [];
    for (const [i, { object, objectIndex, style, background }] of SHEET.entries()) {
      const prompt = canonicalPrompt(object, style, background);
      const [image] = await sd.generate({ prompt, width: size, height: size, steps, cfg, seed: i });
      images.push(image!);
      const library = buildLibrary(pictures, background);
      ranks.push(rankOf(objectIndex, rankObjects(tensorFromImage(image!).data, size, size, library)));
    }
    await writeSheet(images, size, join(folder, cfg === 1 ? 'sheet-unguided.png' : 'sheet.png'));
    const score = scoreOf(ranks, size, cfg);
    scores.push(score);
    console.log(
      `cfg ${cfg}: top-1 ${percent(score.top1)}, top-5 ${percent(score.top5)}; held out: ` +
        `top-1 ${percent(score.heldOut.top1)}, top-5 ${percent(score.heldOut.top5)}`,
    );
  }
  await sd.dispose();
  const chance = { top1: 1 / OBJECTS.length, top5: 5 / OBJECTS.length };
  await writeFile(
    join(folder, 'sheet.json'),
    `${JSON.stringify({ objects: OBJECTS.length, chance, scores }, null, 2)}\n`,
  );
}

function scoreOf(ranks: readonly number[], size: number, cfg: number): Score {
  const share = (list: readonly number[], within: number) => list.filter((rank) => rank <= within).length / list.length;
  const held = ranks.filter((_, i) => SHEET[i]!.heldOut);
  return {
    size,
    cfg,
    pictures: ranks.length,
    top1: share(ranks, 1),
    top5: share(ranks, 5),
    heldOut: { pictures: held.length, top1: share(held, 1), top5: share(held, 5) },
  };
}

async function writeSheet(images: readonly GeneratedImage[], size: number, path: string): Promise<void> {
  const rows = Math.ceil(images.length / SHEET_COLUMNS);
  const tiles = images.map(({ data, width, height }, i) => ({
    input: Buffer.from(data),
    raw: { width, height, channels: 3 as const },
    left: (i % SHEET_COLUMNS) * size,
    top: Math.floor(i / SHEET_COLUMNS) * size,
  }));
  const canvas = { width: SHEET_COLUMNS * size, height: rows * size, channels: 3 as const, background: '#fff' };
  await sharp({ create: canvas }).composite(tiles).png({ palette: false }).toFile(path);
}

function percent(share: number): string {
  return `${(100 * share).toFixed(0)} %`;
}
