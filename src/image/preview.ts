/**
 * Cheap pictures of latents: a linear map from the channels of a latent pixel to red, green and blue, fitted to what
 * the model's own decoder makes of latents. The idea of such factors is ComfyUI's (`latent_formats.py`, Latent2RGB),
 * which stores constants for each model instead.
 */
import { z } from 'zod';
import { torchGenerator } from '../sampling/noise.ts';
import { type FloatTensor, floats } from '../tensor/data.ts';
import { shortList } from '../weights/json.ts';
import { imageFromTensor, type RgbImage } from './image.ts';

/** More than any latent has; those of Stable Diffusion 3 have 16. */
const MAX_CHANNELS = 4096;

/** A preview's colour, each channel about -1..1: `bias + sum over c of weights[c] * latent[c]`. JSON holds it exactly. */
export const previewFactorsSchema = z.object({
  /** For each channel of the latent its red, green and blue. */
  weights: shortList(z.tuple([z.number(), z.number(), z.number()]), MAX_CHANNELS).refine(({ length }) => length > 0),
  bias: z.tuple([z.number(), z.number(), z.number()]),
});

export type PreviewFactors = z.infer<typeof previewFactorsSchema>;

export interface PreviewFitOptions {
  /** Latents to fit on, [batch, channels, height, width]; those of real pictures fit best. Default: smooth noise. */
  readonly latents?: readonly FloatTensor[];
  /** Height and width of the noise that is decoded without `latents`; default 16. */
  readonly size?: number;
  /** How many different ones are decoded; default 4. */
  readonly count?: number;
  /** Seed of the noise; default 0. */
  readonly seed?: number;
}

/**
 * Fits the map by least squares between latent pixels and the mean colours of the picture blocks they become.
 * The same decoder always gives the same factors.
 *
 * @param decode from a latent [batch, channels, h, w] as the diffusion model sees it, about unit variance, to a picture
 *   [batch, 3, scale * h, scale * w] in -1..1
 */
export async function fitPreviewFactors(
  decode: (latent: FloatTensor) => Promise<FloatTensor>,
  channels: number,
  { size = 16, count = 4, seed = 0, latents = smoothNoise(channels, size, count, seed) }: PreviewFitOptions = {},
): Promise<PreviewFactors> {
  const unknowns = channels + 1;
  const normal = Array.from({ length: unknowns }, () => new Float64Array(unknowns));
  const target = Array.from({ length: unknowns }, () => new Float64Array(3));
  for (const latent of latents) {
    const colours = blockMeans(await decode(latent), latent);
    const [batch, , height, width] = latent.shape as [number, number, number, number];
    const pixels = height * width;
    const row = new Float64Array(unknowns).fill(1);
    for (let i = 0; i < batch * pixels; i++) {
      const [index, pixel] = [Math.floor(i / pixels), i % pixels];
      for (let c = 0; c < channels; c++) row[c] = latent.data[(index * channels + c) * pixels + pixel]!;
      for (let a = 0; a < unknowns; a++) {
        for (let b = 0; b < unknowns; b++) normal[a]![b]! += row[a]! * row[b]!;
        for (let rgb = 0; rgb < 3; rgb++) target[a]![rgb]! += row[a]! * colours[(index * 3 + rgb) * pixels + pixel]!;
      }
    }
  }
  const solution = solve(normal, target);
  return { weights: solution.slice(0, channels), bias: solution[channels]! };
}

/**
 * Pictures of latents, one pixel for each of theirs.
 * @param latent [batch, channels, height, width]
 */
export function previewImage(latent: FloatTensor, { weights, bias }: PreviewFactors): RgbImage[] {
  const [batch, channels, height, width] = latent.shape as [number, number, number, number];
  if (latent.shape.length !== 4 || channels !== weights.length) {
    throw new RangeError(
      `Preview factors of ${weights.length} channels do not fit a latent of shape [${latent.shape.join(', ')}].`,
    );
  }
  const pixels = height * width;
  const colours = new Float32Array(batch * 3 * pixels);
  for (let index = 0; index < batch; index++) {
    for (let rgb = 0; rgb < 3; rgb++) {
      const plane = colours.subarray((index * 3 + rgb) * pixels, (index * 3 + rgb + 1) * pixels).fill(bias[rgb]!);
      for (let c = 0; c < channels; c++) {
        const weight = weights[c]![rgb]!;
        const from = (index * channels + c) * pixels;
        for (let i = 0; i < pixels; i++) plane[i]! += weight * latent.data[from + i]!;
      }
    }
  }
  return imageFromTensor(floats([batch, 3, height, width], colours));
}

/** Latent pixels between two independent values of the smooth noise: a decoder sees several pixels around each. */
const NOISE_GRID = 4;

/** `count` latents [1, channels, size, size] of noise that varies slowly, about unit variance. */
function smoothNoise(channels: number, size: number, count: number, seed: number): FloatTensor[] {
  const generator = torchGenerator(seed);
  const corners = Math.ceil(size / NOISE_GRID) + 1;
  return Array.from({ length: count }, () => {
    const values = new Float32Array(channels * size * size);
    for (let c = 0; c < channels; c++) {
      const grid = generator.normal(corners * corners);
      for (let y = 0; y < size; y++) {
        for (let x = 0; x < size; x++) values[(c * size + y) * size + x] = bilinear(grid, corners, y, x);
      }
    }
    return floats([1, channels, size, size], values);
  });
}

/** Weights of four independent corners, scaled so that their squares sum to 1 and the variance stays 1 everywhere. */
function bilinear(grid: Float32Array, corners: number, y: number, x: number): number {
  const [row, column] = [Math.floor(y / NOISE_GRID), Math.floor(x / NOISE_GRID)];
  const [down, right] = [y / NOISE_GRID - row, x / NOISE_GRID - column];
  let sum = 0;
  let squares = 0;
  for (const [dy, dx] of [
    [0, 0],
    [0, 1],
    [1, 0],
    [1, 1],
  ] as const) {
    const weight = (dy ? down : 1 - down) * (dx ? right : 1 - right);
    sum += weight * grid[(row + dy) * corners + column + dx]!;
    squares += weight * weight;
  }
  return sum / Math.sqrt(squares);
}

/** The mean colour of the block of picture pixels that each latent pixel became, [batch, 3, latent height, width]. */
function blockMeans(picture: FloatTensor, latent: FloatTensor): Float64Array {
  const [batch, , height, width] = latent.shape as [number, number, number, number];
  const scale = picture.shape[2]! / height;
  const fits = picture.shape[0] === batch && picture.shape[1] === 3 && picture.shape[3] === width * scale;
  if (!fits || !Number.isInteger(scale)) {
    throw new RangeError(
      `The decoder made a picture of shape [${picture.shape.join(', ')}] of a latent [${latent.shape.join(', ')}].`,
    );
  }
  const means = new Float64Array(batch * 3 * height * width);
  for (let i = 0; i < picture.data.length; i++) {
    const x = i % (width * scale);
    const planeRow = Math.floor(i / (width * scale));
    means[Math.floor(planeRow / scale) * width + Math.floor(x / scale)]! += picture.data[i]! / scale ** 2;
  }
  return means;
}

/** Far below any real variance: keeps a channel that never changes from making the equations unsolvable. */
const RIDGE = 1e-9;

/** Solves `normal * X = target` for a symmetric positive matrix and three right-hand sides (Gauss-Jordan). */
function solve(normal: readonly Float64Array[], target: readonly Float64Array[]): [number, number, number][] {
  const size = normal.length;
  const trace = normal.reduce((sum, row, i) => sum + row[i]!, 0);
  const rows = normal.map((row, i) => Float64Array.of(...row, ...target[i]!));
  for (let i = 0; i < size; i++) rows[i]![i]! += (RIDGE * trace) / size;
  for (let pivot = 0; pivot < size; pivot++) {
    const divisor = rows[pivot]![pivot]!;
    for (let column = pivot; column < size + 3; column++) rows[pivot]![column]! /= divisor;
    for (let row = 0; row < size; row++) {
      if (row === pivot) continue;
      const factor = rows[row]![pivot]!;
      for (let column = pivot; column < size + 3; column++) rows[row]![column]! -= factor * rows[pivot]![column]!;
    }
  }
  return rows.map((row) => [row[size]!, row[size + 1]!, row[size + 2]!]);
}
