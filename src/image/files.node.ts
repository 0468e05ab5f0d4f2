/** Pictures from and to files: any common format in, PNG out. */
import { existsSync } from 'node:fs';
import { mkdir, readFile, stat } from 'node:fs/promises';
import { basename, dirname, extname, join } from 'node:path';
import sharp from 'sharp';
import { MmditxError } from '../errors.ts';
import { ioError, writeFileAtomically } from '../weights/atomic.node.ts';
import { quote } from '../weights/quote.ts';
import { blend, type RgbaImage } from './image.ts';

/** Pictures with more pixels are refused unless the caller allows more: 8192 x 8192. */
const DEFAULT_MAX_PIXELS = 2 ** 26;

/** 8192 x 8192 pixels of four samples of 16 bits, not compressed at all. */
const MAX_FILE_BYTES = 2 ** 29;

/** What is read, by sharp's names. AVIF is HEIF with AV1 inside; vector formats have no pixels to bound. */
const readableFormats = ['jpeg', 'png', 'webp', 'heif'];

export interface ReadImageOptions {
  /** Larger pictures are refused before they are decoded; default 2^26. */
  readonly maxPixels?: number;
  /** The colour behind transparent pixels, red, green, blue 0..255; default white. */
  readonly background?: readonly [number, number, number];
  /** Scales the picture until it covers this size and cuts what stands out on two sides; default: as it is. */
  readonly size?: { readonly width: number; readonly height: number };
}

/**
 * A JPEG, PNG, WebP or AVIF file as sRGB pixels: turned upright by its EXIF orientation, converted from its colour
 * profile, of an animation the first picture.
 *
 * @throws MmditxError `io` when the file cannot be read, `bad-file` when it is no such picture, damaged, or has more
 *   than `maxPixels`
 */
export async function readImageFile(path: string, options: ReadImageOptions = {}): Promise<RgbaImage> {
  const { maxPixels = DEFAULT_MAX_PIXELS, background = [255, 255, 255], size } = options;
  const file = await stat(path).catch((cause) => {
    throw ioError('read', path, cause);
  });
  if (file.isDirectory()) throw ioError('read', path, { code: 'EISDIR' });
  if (!file.isFile()) throw ioError('read', path, new Error('it is a pipe or a device; give a file'));

  const formats = 'a JPEG, PNG, WebP or AVIF file';
  if (file.size > MAX_FILE_BYTES) {
    throw new MmditxError('bad-file', `${path} is too large to be a picture; give ${formats}.`);
  }
  // Not by its path: libvips keeps what it decoded and would give the old picture when the file has changed.
  const bytes = await readFile(path).catch((cause) => {
    throw ioError('read', path, cause);
  });
  const noPicture = (cause?: unknown) =>
    new MmditxError('bad-file', `${path} is not a picture; give ${formats}.`, { cause });
  if (bytes.length === 0) throw noPicture();
  const source = sharp(bytes, { limitInputPixels: false, failOn: 'error' });
  const metadata = await source.metadata().catch((cause) => {
    throw noPicture(cause);
  });
  const { format, compression } = metadata;
  if (!readableFormats.includes(format) || (format === 'heif' && compression !== 'av1')) {
    throw new MmditxError('bad-file', `${path} is a picture in the format ${compression ?? format}; give ${formats}.`);
  }
  if (metadata.width * metadata.height > maxPixels) {
    throw new MmditxError(
      'bad-file',
      `${path} is ${metadata.width} x ${metadata.height} pixels, more than ${maxPixels}; scale it down first.`,
    );
  }

  let upright = source.autoOrient();
  if (size) upright = upright.resize({ ...size, fit: 'cover' });
  const { data, info } = await upright
    .toColourspace('srgb')
    .ensureAlpha()
    .raw({ depth: 'uchar' })
    .toBuffer({ resolveWithObject: true })
    .catch((cause) => {
      // libvips writes a line for each fault.
      const fault = String(cause.message).split('\n', 1)[0]!;
      throw new MmditxError('bad-file', `${path} is damaged (${quote(fault)}); get it again.`, { cause });
    });
  return overBackground(data, info.width, info.height, background);
}

/** RGBA pixels as RGB over a background, their alpha kept where it matters. */
function overBackground(
  rgba: Uint8Array,
  width: number,
  height: number,
  background: readonly [number, number, number],
): RgbaImage {
  const data = new Uint8Array(3 * width * height);
  const alpha = new Uint8Array(width * height);
  for (let i = 0; i < alpha.length; i++) {
    const opacity = rgba[4 * i + 3]!;
    alpha[i] = opacity;
    for (let channel = 0; channel < 3; channel++) {
      data[3 * i + channel] = blend(rgba[4 * i + channel]!, background[channel]!, opacity);
    }
  }
  return alpha.every((opacity) => opacity === 255) ? { width, height, data } : { width, height, data, alpha };
}

/**
 * Writes a PNG file (or any bytes) whole or not at all, creating the folders it is to lie in.
 * @throws MmditxError `io` when the file system refuses
 */
export async function writePng(path: string, bytes: Uint8Array): Promise<void> {
  await mkdir(dirname(path), { recursive: true }).catch((cause) => {
    throw ioError('write', path, cause);
  });
  await writeFileAtomically(path, [bytes]);
}

/** What the placeholders of an output pattern stand for. */
export interface OutputValues {
  readonly seed: number | bigint;
  /** Number of the picture among those of one run, from 0. */
  readonly index: number;
  /** How many pictures the run makes. */
  readonly count: number;
  readonly width: number;
  readonly height: number;
  readonly prompt: string;
}

export interface OutputOptions {
  /** Whether an existing file may be replaced; default false. */
  readonly overwrite?: boolean;
}

/**
 * The path for a picture from a pattern such as `out/{seed}-{index}.png`. Placeholders: `{seed}`, `{index}`,
 * `{width}`, `{height}`, and `{prompt}`, its first words made fit for a file name. Of several pictures without
 * `{index}` in the pattern each gets its index at the end. `.png` is added where it is missing. While the path belongs
 * to an existing file, `-1`, `-2`, ... is tried.
 *
 * @throws MmditxError `bad-option` for an unknown placeholder, a pattern without a file name, or another format's ending
 */
export function outputPath(pattern: string, values: OutputValues, { overwrite = false }: OutputOptions = {}): string {
  if (basename(pattern) === '' || /[/\\]$/.test(pattern)) {
    throw new MmditxError(
      'bad-option',
      `The output "${pattern}" names no file; end it with one, such as {seed}-{index}.png.`,
    );
  }
  const ending = extname(pattern).toLowerCase();
  if (['.jpg', '.jpeg', '.webp', '.avif', '.gif', '.bmp', '.tif', '.tiff'].includes(ending)) {
    throw new MmditxError('bad-option', `The output "${pattern}" ends in ${ending}; pictures are written as .png.`);
  }
  const stem = ending === '.png' ? pattern.slice(0, -ending.length) : pattern;
  const extension = ending === '.png' ? pattern.slice(-ending.length) : '.png';
  const numbered = values.count > 1 && !stem.includes('{index}') ? `${stem}-{index}` : stem;
  const filled = safeName(
    numbered.replace(/\{([^{}/\\]*)\}/g, (_, name: string) => placeholder(pattern, name, values)),
  );

  let path = filled + extension;
  for (let copy = 1; !overwrite && existsSync(path); copy++) path = `${filled}-${copy}${extension}`;
  return path;
}

function placeholder(pattern: string, name: string, values: OutputValues): string {
  switch (name) {
    case 'seed':
    case 'index':
    case 'width':
    case 'height':
      return String(values[name]);
    case 'prompt':
      return promptName(values.prompt);
    default:
      throw new MmditxError(
        'bad-option',
        `The output "${pattern}" has the unknown placeholder {${name}}; known are {seed}, {index}, {width}, {height} and {prompt}.`,
      );
  }
}

/** File systems allow 255 bytes a name; this leaves room for the rest of it. */
const MAX_PROMPT_BYTES = 120;

/** A prompt as part of a file name: letters and digits of any script, everything else between them a hyphen. */
function promptName(prompt: string): string {
  const words = prompt.normalize('NFC').replace(/[^\p{L}\p{M}\p{N}]+/gu, '-');
  let name = '';
  for (const character of words.replace(/^-/, '')) {
    if (Buffer.byteLength(name + character) > MAX_PROMPT_BYTES) break;
    name += character;
  }
  return name.replace(/-$/, '') || 'untitled';
}

/** Windows keeps these names for devices, whatever their ending. */
const deviceName = /^(con|prn|aux|nul|com\d|lpt\d)$/i;

function safeName(path: string): string {
  return deviceName.test(basename(path)) ? join(dirname(path), `${basename(path)}_`) : path;
}
