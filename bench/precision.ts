/**
 * What precisions cost: the error of the velocity and of final pictures against fp32, and the bytes of the weights.
 * Pictures go to the folder that is given, if any.
 */

import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { load } from '../src/index.node.ts';
import { loadTransformer } from '../src/models/transformer.ts';
import { partsToConvert, weightBytes } from '../src/pipeline/precision.ts';
import { nodeRuntime } from '../src/runtime/node.node.ts';
import type { FloatTensor } from '../src/tensor/data.ts';
import { PRECISIONS, type Precision } from '../src/weights/convert.ts';
import { convertParts } from '../src/weights/converted.node.ts';
import { GOLDEN, SMALL, transformerInputs, withModel, withTemporaryFolder } from './models.ts';
import { MIB, publish, QUICK, type Row, rounded, THREADS } from './support.ts';

/** Objects, styles and backgrounds that the small model was taught; the seed is the place in this list. */
const PROMPTS = [
  '3d fox on a teal background',
  'flat apple on a yellow background',
  'glossy bicycle on a white background',
  'cartoon owl on a blue background',
  '3d rocket on an orange background',
  'flat guitar on a pink background',
  'glossy mushroom on a green background',
  'cartoon castle on a purple background',
].slice(0, QUICK ? 1 : 8);
const STEPS = QUICK ? 2 : 28;
const CFG = 4;
/** Tokens of image and text for the velocity: a picture of 128 x 128 pixels. */
const [IMAGE_TOKENS, TEXT_TOKENS] = [64, 32];

/** |a - b| / |b| */
function relativeError(a: Float32Array, b: Float32Array): number {
  const squares = (values: Float32Array) => values.reduce((sum, value) => sum + value ** 2, 0);
  return Math.sqrt(squares(a.map((value, i) => value - b[i]!)) / squares(b));
}

/** In dB, of two pictures with 8 bits a channel. */
function psnr(a: Uint8Array, b: Uint8Array): number {
  const mean = a.reduce((sum, value, i) => sum + (value - b[i]!) ** 2, 0) / a.length;
  return 10 * Math.log10(255 ** 2 / mean);
}

interface Measured {
  readonly velocity: Float32Array;
  /** Of all networks. */
  readonly bytes: number;
  readonly pictures: readonly Uint8Array[];
}

async function measure(path: string, precision: Precision, cacheFolder: string, draws: boolean): Promise<Measured> {
  const { velocity, bytes } = await withModel(path, async (original) => {
    const parts = partsToConvert(original, precision);
    const { checkpoint, close } = await convertParts(original, parts, precision, { folder: cacheFolder });
    const runtime = nodeRuntime({ device: 'cpu', threads: THREADS });
    const part = checkpoint.parts.transformer!;
    const transformer = loadTransformer(runtime, part, { expandWeights: precision === 'fp32' });
    const inputs = transformerInputs(part.config, IMAGE_TOKENS, TEXT_TOKENS);
    const [velocity] = (await transformer.velocities(inputs.latent, inputs.timesteps, [inputs])) as [FloatTensor];
    await transformer.dispose();
    await close();
    const sizes = [...weightBytes(checkpoint, precision).values()];
    return { velocity: velocity.data, bytes: sizes.reduce((sum, size) => sum + size, 0) };
  });
  const pictures: Uint8Array[] = [];
  if (draws) {
    const sd = await load(path, { device: 'cpu', threads: THREADS, precision, cacheFolder });
    for (const [seed, prompt] of PROMPTS.entries()) {
      const [image] = await sd.generate({ prompt, seed, steps: STEPS, cfg: CFG });
      pictures.push(image!.data);
      await keep(`${precision}-${seed}.png`, image!.png());
    }
    await sd.dispose();
  }
  return { velocity, bytes, pictures };
}

async function keep(name: string, png: Uint8Array): Promise<void> {
  const folder = process.argv[2];
  if (folder === undefined) return;
  await mkdir(folder, { recursive: true });
  await writeFile(join(folder, name), png);
}

const rows: Row[] = [];
for (const [model, path] of Object.entries({ golden: GOLDEN, small: SMALL })) {
  if (!path) continue;
  await withTemporaryFolder(async (folder) => {
    let exact: Measured | undefined;
    for (const precision of PRECISIONS) {
      const measured = await measure(path, precision, folder, model === 'small');
      exact ??= measured;
      const decibels = measured.pictures.map((picture, i) => psnr(picture, exact!.pictures[i]!));
      const shown = (value: number) => (value === Number.POSITIVE_INFINITY ? 'equal' : rounded(value));
      rows.push({
        model,
        precision,
        'velocity, relative error': rounded(relativeError(measured.velocity, exact.velocity), 2),
        // Pictures that are equal have no noise.
        'PSNR, mean dB': decibels.length === 0 ? '' : shown(decibels.reduce((a, b) => a + b, 0) / decibels.length),
        'PSNR, worst dB': decibels.length === 0 ? '' : shown(Math.min(...decibels)),
        'weights, MiB': rounded(measured.bytes / MIB),
      });
    }
  });
}
await publish({
  title: 'Precisions of weights against fp32',
  rows,
  settings: { threads: THREADS, prompts: PROMPTS.length, steps: STEPS, cfg: CFG },
});
