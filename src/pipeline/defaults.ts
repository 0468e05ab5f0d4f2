/** What a checkpoint says about how it wants to be used: a small model is not made for 1024 pixels. */

import { z } from 'zod';
import { MmditxError } from '../errors.ts';
import { type PreviewFactors, previewFactorsSchema } from '../image/preview.ts';
import { type SamplingDefaults, samplingDefaults } from '../sampling/defaults.ts';
import { samplerNames } from '../sampling/samplers.ts';
import { scheduleNames } from '../sampling/schedules.ts';

/** The metadata entry with a model's own defaults, as JSON. */
export const DEFAULTS_KEY = 'mmditx.defaults';

/** The metadata entry with the factors of previews, as JSON; without it they are fitted to the decoder when needed. */
export const PREVIEW_KEY = 'mmditx.preview';

/** Side in pixels of a picture nobody gave a size for (Stability-AI/sd3.5, `sd3_infer.py`). */
const DEFAULT_SIZE = 1024;

const overrides = z
  .object({
    width: z.int().positive(),
    height: z.int().positive(),
    steps: z.int().positive(),
    cfg: z.number(),
    shift: z.number().positive(),
    sampler: z.enum(samplerNames),
    schedule: z.enum(scheduleNames),
    skipLayers: z.array(z.int().nonnegative()),
  })
  .partial();
export type DefaultOverrides = z.infer<typeof overrides>;

export interface ModelDefaults extends SamplingDefaults {
  readonly width: number;
  readonly height: number;
}

/** The official settings of Stable Diffusion 3.5 Medium, changed where the checkpoint's metadata says so. */
export function modelDefaults(metadata: Readonly<Record<string, string>>, file: string): ModelDefaults {
  const text = metadata[DEFAULTS_KEY];
  const { skipLayers, ...own } = text === undefined ? {} : parseOverrides(text, file);
  const stated = Object.fromEntries(Object.entries(own).filter(([, value]) => value !== undefined));
  const skipLayer = skipLayers ? { ...samplingDefaults.skipLayer, layers: skipLayers } : samplingDefaults.skipLayer;
  return { width: DEFAULT_SIZE, height: DEFAULT_SIZE, ...samplingDefaults, ...stated, skipLayer };
}

/** The preview factors that a checkpoint brings. */
export function storedPreviewFactors(
  metadata: Readonly<Record<string, string>>,
  file: string,
): PreviewFactors | undefined {
  const text = metadata[PREVIEW_KEY];
  if (text === undefined) return undefined;
  try {
    return previewFactorsSchema.parse(JSON.parse(text));
  } catch (cause) {
    throw new MmditxError('bad-file', `The metadata entry ${PREVIEW_KEY} of ${file} is not valid; remove it.`, {
      cause,
    });
  }
}

function parseOverrides(text: string, file: string): DefaultOverrides {
  try {
    return overrides.parse(JSON.parse(text));
  } catch (cause) {
    throw new MmditxError('bad-file', `The metadata entry ${DEFAULTS_KEY} of ${file} is not valid; remove it.`, {
      cause,
    });
  }
}
