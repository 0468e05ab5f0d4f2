/** Drawing a picture again from the settings inside it. */
import { open } from 'node:fs/promises';
import { basename } from 'node:path';
import { MmditxError } from '../errors.ts';
import { type GenerationSettings, type PictureSettings, settingsFromPng } from '../image/settings.ts';
import type { GenerateOptions } from '../pipeline/options.ts';
import type { ModelIdentity } from '../pipeline/pipeline.ts';
import { DEVICES, type Device } from '../runtime/runtime.ts';
import { ioError } from '../weights/atomic.node.ts';
import { PRECISIONS, type Precision } from '../weights/convert.ts';
import { defined } from './values.ts';

/** Larger files are not read in search of settings: no picture this package reads has as many bytes. */
const MAX_BYTES = 2 ** 29;

/**
 * The settings inside a PNG file.
 * @throws MmditxError `io`; `bad-file` when it is no PNG file or has no settings
 */
export async function readPictureSettings(path: string): Promise<PictureSettings> {
  const settings = settingsFromPng(await readBounded(path));
  if (settings) return settings;
  throw new MmditxError(
    'bad-file',
    `There are no settings in ${path}; give a picture that mmditx made, with nothing removed from the file.`,
  );
}

async function readBounded(path: string): Promise<Uint8Array> {
  try {
    const handle = await open(path, 'r');
    try {
      const { size } = await handle.stat();
      if (size > MAX_BYTES) throw new MmditxError('bad-file', `${path} is too large to be a picture; give a PNG file.`);
      return await handle.readFile();
    } finally {
      await handle.close();
    }
  } catch (cause) {
    throw cause instanceof MmditxError ? cause : ioError('read', path, cause);
  }
}

/**
 * The options that draw the picture again, as far as its settings tell them. Pictures given as input are not inside
 * the file. The whole batch is drawn again, because its noise is one stream.
 */
export function optionsFromPicture(picture: PictureSettings): Partial<GenerateOptions> {
  if (picture.source === 'parameters') {
    const { fields, ...understood } = picture.settings;
    return understood;
  }
  const {
    batch,
    initImage,
    skipLayerGuidance,
    stepCache,
    mask,
    model,
    device,
    precision,
    loras,
    software,
    version,
    ...same
  } = picture.settings;
  return {
    ...same,
    batchSize: batch.size,
    skipLayerGuidance: skipLayerGuidance ?? false,
    stepCache: stepCache ?? false,
    ...defined({ strength: initImage?.strength, denoiseRule: initImage?.denoiseRule }),
  };
}

/** The device a picture was made on, if this version knows it: others round differently. */
export function deviceFromPicture(settings: GenerationSettings | undefined): Device | undefined {
  return DEVICES.find((device) => device === settings?.device);
}

/** The precision a picture was made in, if this version knows it. */
export function precisionFromPicture(settings: GenerationSettings | undefined): Precision | undefined {
  return PRECISIONS.find((precision) => precision === settings?.precision);
}

/**
 * What differs between a picture's model and the one at hand, as a sentence without its remedy; undefined where they
 * are the same or the picture does not say.
 */
export function modelDifference(settings: GenerationSettings, path: string, model: ModelIdentity): string | undefined {
  const { name, hash } = settings.model;
  if (hash === null || hash === model.hash) return undefined;
  const which = name === model.name ? `another ${name}` : `${name}, not with ${model.name}`;
  return `${basename(path)} was made with ${which}`;
}
