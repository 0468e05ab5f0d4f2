/**
 * Renders the pictures of the recipe into folders that any trainer reads: transparent PNGs with captions beside them.
 * `{colour}` in a caption stands for the background, which the configuration says (`train.yaml`).
 */

import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import sharp from 'sharp';
import { captionLines } from './data/captions.ts';
import { isHeldOut } from './data/held-out.ts';
import { NEW_STYLE, NEW_STYLE_OBJECTS, newStyleCaption, newStylePicture } from './data/new-style.ts';
import { ALL_OBJECTS, OBJECTS, type PictureObject } from './data/objects.ts';
import { openPictureSource, type PictureSource, renderPicture, STYLES, type Style } from './data/pictures.ts';
import { CACHE } from './paths.ts';

/** Side of the pictures in pixels: the 3D set has no larger ones. */
const SIDE = 256;

/** Folders of what is rendered. */
export const PICTURES = {
  /** What the transformer sees: the taught objects in each style that is not held out. */
  taught: join(CACHE, 'pictures/taught'),
  /** What the autoencoder sees: more objects, the held-out pictures no more than there. */
  all: join(CACHE, 'pictures/all'),
  /** Twenty pictures of a style that the model does not know. */
  newStyle: join(CACHE, 'pictures', NEW_STYLE),
};

/** Renders what is not there yet. */
export async function preparePictures(): Promise<void> {
  const source = await openPictureSource();
  await prepareSet(source, PICTURES.taught, OBJECTS);
  await prepareSet(source, PICTURES.all, ALL_OBJECTS);
  await mkdir(PICTURES.newStyle, { recursive: true });
  for (const name of NEW_STYLE_OBJECTS) {
    const object = OBJECTS.find((each) => each.name === name)!;
    const path = join(PICTURES.newStyle, `${name.replaceAll(' ', '-')}.png`);
    await writeFile(path, await newStylePicture(object, SIDE));
    await writeFile(path.replace(/png$/, 'txt'), `${newStyleCaption(object)}\n`);
  }
}

async function prepareSet(source: PictureSource, folder: string, objects: readonly PictureObject[]): Promise<void> {
  await mkdir(folder, { recursive: true });
  for (const object of objects) {
    for (const style of STYLES.filter((each) => !isHeldOut(object, each)))
      await preparePicture(source, folder, object, style);
  }
}

async function preparePicture(
  source: PictureSource,
  folder: string,
  object: PictureObject,
  style: Style,
): Promise<void> {
  const path = join(folder, `${object.name.replaceAll(' ', '-')}-${style}.png`);
  const raw = { width: SIDE, height: SIDE, channels: 4 } as const;
  await sharp(await renderPicture(source, object, style, SIDE), { raw })
    .png()
    .toFile(path);
  await writeFile(path.replace(/png$/, 'txt'), `${captionLines(object, style).join('\n')}\n`);
}
