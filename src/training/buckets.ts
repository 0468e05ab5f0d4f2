/**
 * Aspect-ratio buckets: sizes of about one area to which pictures are resized and cropped, so that a batch has one size
 * and pictures lose little at their edges. Sizes and choices equal those of kohya sd-scripts.
 */
import { MmditxError } from '../errors.ts';
import type { PictureSize } from './config.ts';

/** Latents are 8 times smaller than pictures. */
const LATENT_SCALE = 8;

/** With a step of at least 8 there are at most 4096 buckets. */
const MAX_SIDE = 16_384;

export interface BucketOptions {
  /** Area of the buckets: side of a square, or width and height. Pixels. */
  readonly resolution: number | PictureSize;
  /** Shortest side of a bucket; default 256. */
  readonly min?: number;
  /** Longest side of a bucket; default 1024. */
  readonly max?: number;
  /** Sides are multiples of this, itself a multiple of 8; default 64. */
  readonly step?: number;
  /** Whether small pictures are enlarged (default). If not, they get buckets of their own size, whatever min and max. */
  readonly upscale?: boolean;
}

/** How a picture becomes one of another size. */
export interface BucketFit {
  /** Size that is shown. */
  readonly bucket: PictureSize;
  /** Size the whole picture is resized to; covers the bucket. */
  readonly resized: PictureSize;
  /** Share of the picture's area that lies outside the bucket, 0 to 1. */
  readonly cropped: number;
  /** Factor of the resizing; above 1 the picture is enlarged. */
  readonly scale: number;
}

export interface Buckets {
  /** All sizes made ahead, ordered by width, then height. Pictures that are not enlarged can have others. */
  readonly sizes: readonly PictureSize[];
  /** The bucket of a picture: the nearest aspect ratio, of equally near ones the narrowest. */
  fit(picture: PictureSize): BucketFit;
}

/**
 * The buckets of some options. kohya sd-scripts: `make_bucket_resolutions` and `BucketManager.select_bucket`; a picture
 * that is not to be enlarged but is smaller than one step is enlarged to it.
 *
 * @throws MmditxError `bad-option` for sizes that contradict each other
 */
export function aspectBuckets({
  resolution,
  min = 256,
  max = 1024,
  step = 64,
  upscale = true,
}: BucketOptions): Buckets {
  const [width, height] = typeof resolution === 'number' ? ([resolution, resolution] as const) : resolution;
  checkSides({ width, height, min, max, step });
  const area = width * height;
  const sizes = bucketSizes(area, min, max, step);
  const fit = upscale
    ? (picture: PictureSize) => coverFit(picture, nearestBucket(picture, sizes))
    : (picture: PictureSize) => shrunkFit(picture, area, step);
  return { sizes, fit };
}

/** A picture in exactly this size: resized to the smallest size that covers it, then cropped. */
export function coverFit(picture: PictureSize, bucket: PictureSize): BucketFit {
  return fitOf(picture, bucket, coverSize(picture, bucket));
}

/** The smallest size with a picture's proportions that covers another size, rounded to whole pixels. */
export function coverSize([width, height]: PictureSize, [toWidth, toHeight]: PictureSize): PictureSize {
  const scale = width / height > toWidth / toHeight ? toHeight / height : toWidth / width;
  return [Math.max(Math.floor(width * scale + 0.5), toWidth), Math.max(Math.floor(height * scale + 0.5), toHeight)];
}

function fitOf([width, height]: PictureSize, bucket: PictureSize, resized: PictureSize): BucketFit {
  return {
    bucket,
    resized,
    cropped: 1 - (bucket[0] * bucket[1]) / (resized[0] * resized[1]),
    scale: Math.sqrt((resized[0] / width) * (resized[1] / height)),
  };
}

/** The square, and for every width the largest height within the area, both ways round. */
function bucketSizes(area: number, min: number, max: number, step: number): PictureSize[] {
  const down = (side: number) => Math.floor(side / step) * step;
  const sizes = new Map<string, PictureSize>();
  const add = (...size: PictureSize) => sizes.set(size.join(), size);
  const square = down(Math.sqrt(area));
  add(square, square);
  for (let side = min; side <= max; side += step) {
    const other = Math.min(max, down(area / side));
    if (other < min) continue;
    add(side, other);
    add(other, side);
  }
  return [...sizes.values()].sort((a, b) => a[0] - b[0] || a[1] - b[1]);
}

function nearestBucket([width, height]: PictureSize, sizes: readonly PictureSize[]): PictureSize {
  // Several buckets can have one aspect ratio; a picture that has one's size stays as it is.
  const same = sizes.find((size) => size[0] === width && size[1] === height);
  if (same) return same;
  const distance = (size: PictureSize) => Math.abs(size[0] / size[1] - width / height);
  return sizes.reduce((nearest, size) => (distance(size) < distance(nearest) ? size : nearest));
}

/** A picture that is shrunk if it exceeds the area, then cropped to whole steps. */
function shrunkFit(picture: PictureSize, area: number, step: number): BucketFit {
  const [width, height] = picture;
  const down = (side: number) => Math.max(step, side - (side % step));
  const resized = width * height > area ? shrunkSize(width / height, area, step) : picture;
  const bucket: PictureSize = [down(resized[0]), down(resized[1])];
  const covers = resized[0] >= bucket[0] && resized[1] >= bucket[1];
  return covers ? fitOf(picture, bucket, resized) : coverFit(picture, bucket);
}

/** A size of about an area, one side a whole number of steps: the side that disturbs the aspect ratio less. */
function shrunkSize(aspect: number, area: number, step: number): PictureSize {
  const down = (side: number) => {
    const pixels = Math.floor(side + 0.5);
    return Math.max(step, pixels - (pixels % step));
  };
  const width = down(Math.sqrt(area * aspect));
  const height = down(Math.sqrt(area / aspect));
  const byWidth = Math.abs(width / down(width / aspect) - aspect);
  const byHeight = Math.abs(down(height * aspect) / height - aspect);
  return byWidth < byHeight ? [width, Math.floor(width / aspect + 0.5)] : [Math.floor(height * aspect + 0.5), height];
}

function checkSides(sides: { width: number; height: number; min: number; max: number; step: number }): void {
  const { width, height, min, max, step } = sides;
  const refuse = (fault: string) => {
    throw new MmditxError('bad-option', `The buckets cannot be made: ${fault}.`);
  };
  for (const [name, side] of Object.entries(sides)) {
    if (!(Number.isInteger(side) && side > 0 && side <= MAX_SIDE)) {
      refuse(`${name} is ${side}; give a whole number of pixels from 1 to ${MAX_SIDE}`);
    }
  }
  if (step % LATENT_SCALE !== 0) refuse(`step is ${step}; give a multiple of ${LATENT_SCALE}`);
  for (const [name, side] of Object.entries({ min, max })) {
    if (side % step !== 0) refuse(`${name} is ${side}; give a multiple of step, ${step}`);
  }
  for (const [name, side] of Object.entries({ width, height })) {
    if (side < min) refuse(`the resolution's ${name} is ${side}, less than min, ${min}; lower min`);
    if (side > max) refuse(`the resolution's ${name} is ${side}, more than max, ${max}; raise max`);
  }
  if (Math.sqrt(width * height) < step) refuse(`the resolution is smaller than step, ${step}; lower step`);
}
