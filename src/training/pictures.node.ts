/** The pixels of a data set's picture, as a view of it shows them to the networks. */
import { readFile, stat } from 'node:fs/promises';
import sharp, { type Sharp } from 'sharp';
import { MmditxError } from '../errors.ts';
import { type FloatTensor, floats } from '../tensor/data.ts';
import { quote } from '../weights/quote.ts';
import { coverSize } from './buckets.ts';
import type { PictureSize } from './config.ts';
import type { DatasetPicture } from './dataset.node.ts';

/** Larger pictures are refused before they are decoded: about 11,500 x 11,500 pixels. */
const MAX_PIXELS = 2 ** 27;

/** Larger files are refused before they are read. */
const MAX_FILE_BYTES = 2 ** 28;

/** Longest side of a view, and of a picture that is resized for one, in pixels. */
const MAX_VIEW_SIDE = 16_384;
const MAX_RESIZED_SIDE = 2 ** 20;

/** What is read, by sharp's names. AVIF is HEIF with AV1 inside. */
const readableFormats = ['jpeg', 'png', 'webp', 'heif'];

/** Raised when the same view gets other pixels, so that what was encoded of the old ones is not used. */
const RENDERING = 1;

export const RESIZE_FILTERS = ['lanczos3', 'lanczos2', 'cubic', 'mitchell', 'linear', 'nearest'] as const;
export type ResizeFilter = (typeof RESIZE_FILTERS)[number];

/** Which pixels of a picture are shown. */
export interface PictureView {
  /** Size of the result, in pixels. */
  readonly width: number;
  readonly height: number;
  /** Whether the picture covers the result and is cropped, or lies in it whole and is padded. */
  readonly fit: 'cover' | 'contain';
  /** Where the crop lies in the picture, or the picture in the padding: 0 left or top, 0.5 in the middle, 1 at the end. */
  readonly crop: readonly [x: number, y: number];
  /** Mirrored left to right, after the crop. */
  readonly flip: boolean;
  /** sRGB, 0 to 255, behind transparency and padding. */
  readonly background: readonly [red: number, green: number, blue: number];
  readonly filter: ResizeFilter;
  /** Size of the whole picture before it is cropped or padded; default as `fit` asks for it. */
  readonly resized?: PictureSize;
}

/**
 * A picture as a tensor `[1, 3, height, width]` of sRGB values in [-1, 1]: turned upright by its EXIF orientation,
 * converted from its colour profile, of an animation the first picture.
 *
 * Transparency is composed in sRGB on the background before the resizing. Both are linear, so this equals resizing
 * colours weighed by their opacity: invisible pixels do not fringe the edges, and overshoots are not cut twice.
 *
 * @throws MmditxError `bad-file` naming the picture when it is none, damaged, too large, or too narrow for the view; `io`
 *   when it cannot be read; `bad-option` for a view out of range
 */
export async function renderPicture(
  picture: Pick<DatasetPicture, 'path' | 'name'>,
  view: PictureView,
): Promise<FloatTensor> {
  checkView(view);
  const refuse = ({ code, reason, cause }: PictureFault) =>
    new MmditxError(code, `The picture ${quote(picture.name)} ${reason}; repair or remove it.`, { cause });

  const opened = await openPicture(picture.path);
  if ('reason' in opened) throw refuse(opened);
  const size: PictureSize = [view.width, view.height];
  const resized = view.resized ?? resizedSize([opened.width, opened.height], size, view.fit);
  if (Math.max(...resized) > MAX_RESIZED_SIDE || resized[0] * resized[1] > MAX_PIXELS) {
    const narrow = `is ${opened.width} x ${opened.height} pixels, too narrow to fill ${view.width} x ${view.height}`;
    throw refuse({ code: 'bad-file', reason: narrow });
  }
  const [across, down] = [0, 1].map((axis) => visible(resized[axis]!, size[axis]!, view.crop[axis]!)) as [Span, Span];
  const pixels = await opened.image
    .autoOrient()
    .flatten({ background: { r: view.background[0], g: view.background[1], b: view.background[2] } })
    .resize({ width: resized[0], height: resized[1], fit: 'fill', kernel: view.filter, fastShrinkOnLoad: false })
    .extract({ left: across.from, top: down.from, width: across.length, height: down.length })
    .toColourspace('srgb')
    .raw({ depth: 'uchar' })
    .toBuffer()
    .catch((cause) => {
      throw refuse(damage(cause));
    });
  return placed(pixels, across, down, view);
}

/** Everything that decides the pixels of a view, as a key for what is computed of them. */
export function viewKey({ digest }: Pick<DatasetPicture, 'digest'>, view: PictureView) {
  const { width, height, fit, crop, flip, background, filter, resized } = view;
  return {
    rendering: RENDERING,
    digest,
    width,
    height,
    fit,
    crop: [...crop],
    flip,
    background: [...background],
    filter,
    resized: resized ? [...resized] : null,
  };
}

export interface OpenPicture {
  readonly image: Sharp;
  readonly bytes: Uint8Array;
  /** As shown: turned upright. */
  readonly width: number;
  readonly height: number;
}

/** Why a picture cannot be used, as a clause such as `is not a picture`. */
export interface PictureFault {
  readonly code: 'io' | 'bad-file';
  readonly reason: string;
  readonly cause?: unknown;
}

/** A picture whose bytes are read but not decoded. That it is damaged may only be found when it is. */
export async function openPicture(path: string): Promise<OpenPicture | PictureFault> {
  const bytes = await readWhole(path, MAX_FILE_BYTES);
  if ('reason' in bytes) return bytes;
  const bad = (reason: string): PictureFault => ({ code: 'bad-file', reason });
  if (bytes.length === 0) return bad('is empty');
  // From memory: libvips keeps what it decoded of a path and would give the old picture when the file has changed.
  const image = sharp(bytes, { limitInputPixels: false, failOn: 'error' });
  const metadata = await image.metadata().catch(() => undefined);
  if (!metadata) return bad('is not a picture');
  const { format, compression, autoOrient } = metadata;
  if (!readableFormats.includes(format) || (format === 'heif' && compression !== 'av1')) {
    return bad(`is a picture in the format ${compression ?? format}, not JPEG, PNG, WebP or AVIF`);
  }
  if (metadata.width * metadata.height > MAX_PIXELS) {
    return bad(`is ${metadata.width} x ${metadata.height} pixels, more than ${MAX_PIXELS}`);
  }
  // Grey pictures that are transparent would else show a grey background.
  if (metadata.channels === 2) image.pipelineColourspace('srgb');
  return { image, bytes, width: autoOrient.width, height: autoOrient.height };
}

/** The bytes of an ordinary file of no more than a size. */
export async function readWhole(path: string, maxBytes: number): Promise<Buffer | PictureFault> {
  try {
    const file = await stat(path);
    if (!file.isFile()) return { code: 'io', reason: 'is not a file' };
    if (file.size > maxBytes) return { code: 'bad-file', reason: `is larger than ${maxBytes / 2 ** 20} MiB` };
    return await readFile(path);
  } catch (cause) {
    const code = (cause as NodeJS.ErrnoException).code ?? String(cause);
    return { code: 'io', reason: code === 'ENOENT' ? 'is missing' : `cannot be read (${code})`, cause };
  }
}

function damage(cause: unknown): PictureFault {
  // libvips writes a line for each fault.
  const fault = (cause instanceof Error ? cause.message : String(cause)).split('\n', 1)[0]!;
  return { code: 'bad-file', reason: `is damaged (${quote(fault)})`, cause };
}

function resizedSize(picture: PictureSize, size: PictureSize, fit: PictureView['fit']): PictureSize {
  if (fit === 'cover') return coverSize(picture, size);
  const scale = Math.min(size[0] / picture[0], size[1] / picture[1]);
  const side = (axis: 0 | 1) => Math.min(Math.max(Math.round(picture[axis] * scale), 1), size[axis]);
  return [side(0), side(1)];
}

/** The part of a resized side that is shown: where it begins there and in the result, and how long it is. */
interface Span {
  readonly from: number;
  readonly to: number;
  readonly length: number;
}

/** Halves are rounded down, so that the middle is that of kohya sd-scripts. */
function visible(resized: number, size: number, position: number): Span {
  const offset = Math.ceil(Math.abs(resized - size) * position - 0.5) + 0;
  const length = Math.min(resized, size);
  return resized > size ? { from: offset, to: 0, length } : { from: 0, to: offset, length };
}

/** RGB pixels as the part of a view that they fill; the background fills the rest. */
function placed(rgb: Uint8Array, across: Span, down: Span, view: PictureView): FloatTensor {
  const { width, height, flip, background } = view;
  const plane = width * height;
  const values = new Float32Array(3 * plane);
  const padded = across.length < width || down.length < height;
  for (let channel = 0; channel < 3; channel++) {
    const start = channel * plane;
    if (padded) values.fill(background[channel]! / 127.5 - 1, start, start + plane);
    for (let y = 0, i = channel; y < down.length; y++) {
      const row = start + (down.to + y) * width;
      for (let x = 0; x < across.length; x++, i += 3) {
        const column = across.to + x;
        values[row + (flip ? width - 1 - column : column)] = rgb[i]! / 127.5 - 1;
      }
    }
  }
  return floats([1, 3, height, width], values);
}

function checkView({ width, height, crop, background, resized, filter }: PictureView): void {
  const refuse = (fault: string) => {
    throw new MmditxError('bad-option', `The view of a picture cannot be made: ${fault}.`);
  };
  for (const side of [width, height, ...(resized ?? [])]) {
    if (!(Number.isInteger(side) && side > 0 && side <= MAX_VIEW_SIDE)) {
      refuse(`a side is ${side}; give a whole number of pixels from 1 to ${MAX_VIEW_SIDE}`);
    }
  }
  if (!crop.every((place) => place >= 0 && place <= 1)) refuse(`crop is ${crop.join(', ')}; give numbers from 0 to 1`);
  if (!background.every((value) => value >= 0 && value <= 255)) {
    refuse(`the background is ${background.join(', ')}; give numbers from 0 to 255`);
  }
  if (!RESIZE_FILTERS.includes(filter))
    refuse(`the filter is ${quote(filter)}; known are ${RESIZE_FILTERS.join(', ')}`);
}
