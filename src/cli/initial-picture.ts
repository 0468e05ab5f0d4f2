/** The picture that is redrawn and the mask of what is repainted, brought to the size that is drawn. */
import { MmditxError } from '../errors.ts';
import { readImageFile } from '../image/files.node.ts';
import { imageHash, maskFromImage, type RgbImage } from '../image/image.ts';
import type { GenerationSettings } from '../image/settings.ts';
import { maskImage } from '../pipeline/pipeline.ts';
import type { FloatTensor } from '../tensor/data.ts';

export interface InitialPicture {
  readonly initImage: RgbImage;
  readonly mask?: FloatTensor;
  /** Something the user should know about its size. */
  readonly note?: string;
}

export interface InitialPictureOptions {
  readonly initImage: string;
  /** White is repainted, black kept. */
  readonly mask?: string | undefined;
  /** Pixels; default the picture's own, rounded down. */
  readonly width?: number | undefined;
  readonly height?: number | undefined;
  /** What width and height are multiples of. */
  readonly unit: number;
}

/** How much the proportions of a mask may differ from the picture's: a pixel more or less from resizing. */
const PROPORTION_TOLERANCE = 0.02;

/**
 * Reads both and scales them until they cover the size; what stands out on two sides is cut.
 * @throws MmditxError `io`, `bad-file`; `bad-option` for a mask of other proportions
 */
export async function readInitialPicture(options: InitialPictureOptions): Promise<InitialPicture> {
  const { unit } = options;
  const own = await readImageFile(options.initImage);
  const fitting = (side: number) => Math.max(Math.floor(side / unit) * unit, unit);
  const { width = fitting(own.width), height = fitting(own.height) } = options;
  const size = { width, height };
  const isFitted = own.width === width && own.height === height;
  const initImage = isFitted ? own : await readImageFile(options.initImage, { size });

  let mask: FloatTensor | undefined;
  if (options.mask !== undefined) {
    const ownMask = await readImageFile(options.mask);
    const proportion = ownMask.width / ownMask.height / (own.width / own.height);
    if (Math.abs(proportion - 1) > PROPORTION_TOLERANCE) {
      throw new MmditxError(
        'bad-option',
        `The mask ${options.mask} is ${ownMask.width}x${ownMask.height} and the picture ${own.width}x${own.height}; give a mask of the same proportions.`,
      );
    }
    mask = maskFromImage(await readImageFile(options.mask, { size }));
  }
  const isChosen = options.width !== undefined && options.height !== undefined;
  return {
    initImage,
    ...(mask && { mask }),
    ...(!isFitted &&
      !isChosen && {
        note: `${options.initImage} is ${own.width}x${own.height}; it is scaled and cut to ${width}x${height}, multiples of ${unit}.`,
      }),
  };
}

/**
 * Makes sure that a picture is drawn again from the pictures it was first drawn from.
 * @throws MmditxError `bad-option` when one is missing or is another one
 */
export async function requireSamePictures(
  settings: GenerationSettings,
  { initImage, mask }: { readonly initImage?: RgbImage | undefined; readonly mask?: FloatTensor | undefined },
): Promise<void> {
  const pictures = [
    { option: '--init-image', wanted: settings.initImage?.sha256, given: initImage },
    { option: '--mask', wanted: settings.mask?.sha256, given: mask && maskImage(mask) },
  ];
  for (const { option, wanted, given } of pictures) {
    if (wanted === undefined) continue;
    if (!given) throw new MmditxError('bad-option', `The picture was drawn with ${option}; give the same file again.`);
    if ((await imageHash(given)) !== wanted) {
      throw new MmditxError(
        'bad-option',
        `The file of ${option} is not the one the picture was drawn from; give the same file at the same size.`,
      );
    }
  }
}
