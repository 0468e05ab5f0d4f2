/**
 * The pictures of the small model: every object of `objects.ts` in four styles, on a transparent ground.
 *
 * They come from npm packages, at the versions pinned in `models/small/package.json` (`npm install` in that folder):
 *
 * | style    | package                          | picture        | licence of the art     |
 * |----------|----------------------------------|----------------|------------------------|
 * | 3d       | `@lobehub/fluent-emoji-3d`       | webp, 256 px   | MIT (Microsoft)        |
 * | gradient | `@iconify-json/fluent-emoji`     | SVG            | MIT (Microsoft)        |
 * | flat     | `@iconify-json/fluent-emoji-flat`| SVG            | MIT (Microsoft)        |
 * | noto     | `@iconify-json/noto`             | SVG            | Apache-2.0 (Google)    |
 */
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { mkdir, readFile, rename, rm, writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import sharp from 'sharp';
import { OBJECTS, type PictureObject } from './objects.ts';

export const STYLES = ['3d', 'gradient', 'flat', 'noto'] as const;
export type Style = (typeof STYLES)[number];

/** The side of the 3D set's pictures, and the largest we make. */
const LARGEST_SIZE = 256;

/**
 * SVGs are drawn this large and then scaled down. Drawing them at the wanted size would leave jagged edges: the filters
 * of the gradient set cut the alpha channel to all or nothing.
 */
const DRAWN_SIZE = 512;

/** Transparent border on each side, as a part of the side; the sets' own borders (about 1/32) come on top. */
const MARGIN = 1 / 32;

/** Part of the cache's name; change it when a change of this file changes pixels. */
const RENDERING = 'lanczos3-margin32-drawn512';

/**
 * Where npm put the recipe's own packages: `models/small/node_modules` of the checkout. Looked for upwards, because the
 * compiled recipe lies in another folder of it. Undefined where they are not installed.
 */
export function findPackageFolder(): string | undefined {
  for (let folder = dirname(fileURLToPath(import.meta.url)); ; folder = dirname(folder)) {
    const packages = join(folder, 'models/small/node_modules');
    if (existsSync(join(packages, '@lobehub/fluent-emoji-3d'))) return packages;
    if (folder === dirname(folder)) return undefined;
  }
}

interface IconSet {
  readonly icons: Readonly<
    Record<string, { readonly body: string; readonly width?: number; readonly height?: number }>
  >;
  readonly aliases?: Readonly<Record<string, { readonly parent: string }>>;
  readonly width?: number;
  readonly height?: number;
}

/** The four packages, read once. */
export interface PictureSource {
  /** An SVG or webp file's bytes; throws where the set lacks the object. */
  read(object: PictureObject, style: Style): Promise<Buffer>;
}

/**
 * Opens the four packages (about 140 MB of JSON: a second or two).
 * @param packageFolder a `node_modules` folder that has them
 * @throws Error naming the remedy where they are not installed.
 */
export async function openPictureSource(packageFolder = findPackageFolder()): Promise<PictureSource> {
  if (packageFolder === undefined)
    throw new Error('The picture packages are missing; run "npm install" in models/small.');
  const json = async <T>(path: string): Promise<T> =>
    JSON.parse(await readFile(join(packageFolder, path), 'utf8')) as T;
  const [gradient, flat, noto, flatNames, notoNames] = await Promise.all([
    json<IconSet>('@iconify-json/fluent-emoji/icons.json'),
    json<IconSet>('@iconify-json/fluent-emoji-flat/icons.json'),
    json<IconSet>('@iconify-json/noto/icons.json'),
    json<Record<string, string>>('@iconify-json/fluent-emoji-flat/chars.json'),
    json<Record<string, string>>('@iconify-json/noto/chars.json'),
  ]);
  const sets = {
    // The gradient set's table of code points is empty, but its icons have the names of the flat set's.
    gradient: { set: gradient, names: flatNames },
    flat: { set: flat, names: flatNames },
    noto: { set: noto, names: notoNames },
  };

  return {
    async read(object, style) {
      // The 3D files spell the variation selector out where Unicode's full form has it; the tables vary.
      const spellings = [object.codepoints, `${object.codepoints}-fe0f`];
      if (style === '3d') {
        const paths = spellings.map((name) => join(packageFolder, '@lobehub/fluent-emoji-3d/assets', `${name}.webp`));
        const path = paths.find(existsSync);
        if (path === undefined) throw new Error(`The 3d set has no picture of ${object.name} (${object.codepoints}).`);
        return readFile(path);
      }
      const { set, names } = sets[style];
      const name = spellings.map((spelling) => names[spelling]).find((found) => found !== undefined);
      const icon = name === undefined ? undefined : (set.icons[name] ?? set.icons[set.aliases?.[name]?.parent ?? '']);
      if (icon === undefined)
        throw new Error(`The ${style} set has no picture of ${object.name} (${object.codepoints}).`);
      const width = icon.width ?? set.width ?? 16;
      const height = icon.height ?? set.height ?? 16;
      return Buffer.from(
        `<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" ` +
          `width="${DRAWN_SIZE}" height="${DRAWN_SIZE}" viewBox="0 0 ${width} ${height}">${icon.body}</svg>`,
      );
    },
  };
}

/**
 * One picture: `size` x `size` pixels RGBA, rows from the top, 8 bits, colour not multiplied by alpha (as in a PNG).
 * Scaled with Lanczos-3 on colours multiplied by alpha, so that no fringe of hidden colour appears at the edges.
 */
export async function renderPicture(
  source: PictureSource,
  object: PictureObject,
  style: Style,
  size: number,
): Promise<Uint8Array> {
  const inner = Math.round(size * (1 - 2 * MARGIN));
  const before = Math.floor((size - inner) / 2);
  const after = size - inner - before;
  // Two steps, because sharp would hand the scaling on to the SVG's drawing.
  const file = await source.read(object, style);
  const drawn = await sharp(file).ensureAlpha().raw().toBuffer({ resolveWithObject: true });
  const { width, height } = drawn.info;
  const pixels = await sharp(drawn.data, { raw: { width, height, channels: 4 } })
    .resize(inner, inner, { fit: 'contain', kernel: 'lanczos3', background: { r: 0, g: 0, b: 0, alpha: 0 } })
    .extend({ top: before, left: before, bottom: after, right: after, background: { r: 0, g: 0, b: 0, alpha: 0 } })
    .raw()
    .toBuffer();
  if (pixels.length !== size * size * 4) throw new Error(`${object.name}, ${style}: unexpected pixel format.`);
  return new Uint8Array(pixels.buffer, pixels.byteOffset, pixels.length);
}

/** All pictures at one size. */
export interface PictureSet {
  /** Side in pixels. */
  readonly size: number;
  readonly objects: readonly PictureObject[];
  readonly styles: readonly Style[];
  /** [objects, styles, size, size, 4], 8-bit RGBA as `renderPicture` gives it. */
  readonly rgba: Uint8Array;
}

export interface LoadPicturesOptions {
  /** Side in pixels, 8 to 256. */
  readonly size: number;
  /** Where the rendered pictures are kept: one file for each size, a second's read instead of a minute's drawing. */
  readonly cacheFolder: string;
  readonly objects?: readonly PictureObject[];
  readonly packageFolder?: string;
  readonly onProgress?: (done: number, total: number) => void;
}

/** Every object in every style, from the cache, or rendered and put there. */
export async function loadPictures(options: LoadPicturesOptions): Promise<PictureSet> {
  const { size, cacheFolder, objects = OBJECTS, packageFolder, onProgress } = options;
  if (!Number.isInteger(size) || size < 8 || size > LARGEST_SIZE) {
    throw new RangeError(`Picture size ${size}: give a whole number from 8 to ${LARGEST_SIZE}.`);
  }
  const pictureBytes = size * size * 4;
  const total = objects.length * STYLES.length;
  const contents = [RENDERING, ...STYLES, ...objects.map((object) => object.codepoints)].join(' ');
  const digest = createHash('sha256').update(contents).digest('hex').slice(0, 12);
  const path = join(cacheFolder, `pictures-${size}-${digest}.rgba`);
  const cached = await readFile(path).catch(() => undefined);
  if (cached?.length === total * pictureBytes) {
    return { size, objects, styles: STYLES, rgba: new Uint8Array(cached.buffer, cached.byteOffset, cached.length) };
  }

  const source = await openPictureSource(packageFolder);
  const rgba = new Uint8Array(total * pictureBytes);
  let next = 0;
  let done = 0;
  const worker = async () => {
    while (next < total) {
      const index = next++;
      const object = objects[Math.floor(index / STYLES.length)]!;
      const style = STYLES[index % STYLES.length]!;
      rgba.set(await renderPicture(source, object, style, size), index * pictureBytes);
      onProgress?.(++done, total);
    }
  };
  await Promise.all([worker(), worker(), worker(), worker()]);

  // Renamed into place, so that a run killed while writing leaves no half cache behind.
  await mkdir(cacheFolder, { recursive: true });
  const unfinished = `${path}.${process.pid}`;
  try {
    await writeFile(unfinished, rgba);
    await rename(unfinished, path);
  } catch (error) {
    await rm(unfinished, { force: true });
    throw error;
  }
  return { size, objects, styles: STYLES, rgba };
}

/** One picture of a set, [size, size, 4]: a view, not a copy. */
export function pictureAt(set: PictureSet, objectIndex: number, styleIndex: number): Uint8Array {
  const bytes = set.size * set.size * 4;
  const start = (objectIndex * set.styles.length + styleIndex) * bytes;
  return set.rgba.subarray(start, start + bytes);
}

/**
 * A picture laid over a plain colour: [3, height, width] in [-1, 1], the range the VAE takes. Blended on the sRGB
 * values themselves, as browsers and image programs do.
 * @param rgba [height, width, 4], 8 bits, colour not multiplied by alpha
 * @param background red, green, blue, 0 to 255
 * @param out where to write, so that a trainer can fill a batch in place; a new array by default
 */
export function compose(
  rgba: Uint8Array,
  background: readonly [number, number, number],
  out: Float32Array = new Float32Array((rgba.length / 4) * 3),
): Float32Array {
  const pixels = rgba.length / 4;
  for (let channel = 0; channel < 3; channel++) {
    const ground = background[channel]!;
    for (let pixel = 0; pixel < pixels; pixel++) {
      const alpha = rgba[pixel * 4 + 3]! / 255;
      const value = ground + (rgba[pixel * 4 + channel]! - ground) * alpha;
      out[channel * pixels + pixel] = value / 127.5 - 1;
    }
  }
  return out;
}
