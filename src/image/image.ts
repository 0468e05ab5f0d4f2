/**
 * Pictures as 8-bit RGB, and their way into and out of tensors.
 */
import { MmditxError } from '../errors.ts';
import { type FloatTensor, floats } from '../tensor/data.ts';

/** A picture of 8-bit sRGB pixels. */
export interface RgbImage {
  readonly width: number;
  readonly height: number;
  /** `width * height * 3` bytes: red, green, blue, row by row from the top. */
  readonly data: Uint8Array;
}

/** A picture that may be transparent in places. */
export interface RgbaImage extends RgbImage {
  /** `width * height` bytes, 0 transparent to 255 opaque; absent when every pixel is opaque. */
  readonly alpha?: Uint8Array;
}

export interface PixelOptions {
  /**
   * How 0..255 becomes a whole number: `truncate` as Stability's reference code and ComfyUI, `nearest-even` as
   * diffusers (NumPy's `round`). Default `truncate`.
   */
  readonly rounding?: 'truncate' | 'nearest-even';
}

/**
 * Pictures from decoded tensors: `255 * clamp((y + 1) / 2, 0, 1)`, in float32 as the references compute it.
 *
 * @param decoded [batch, 3, height, width], about -1..1
 * @throws MmditxError `not-finite` when a value is NaN
 */
export function imageFromTensor(decoded: FloatTensor, { rounding = 'truncate' }: PixelOptions = {}): RgbImage[] {
  const [batch, height, width] = pictureShape(decoded, 3);
  const toByte = rounding === 'truncate' ? Math.trunc : roundHalfToEven;
  const pixels = height * width;
  return Array.from({ length: batch }, (_, index) => {
    const data = new Uint8Array(3 * pixels);
    for (let channel = 0; channel < 3; channel++) {
      const plane = decoded.data.subarray((index * 3 + channel) * pixels, (index * 3 + channel + 1) * pixels);
      for (let i = 0; i < pixels; i++) {
        const share = Math.min(Math.max(Math.fround(plane[i]! + 1) / 2, 0), 1);
        if (Number.isNaN(share)) {
          throw new MmditxError(
            'not-finite',
            'The decoded picture has values that are not finite; try a higher precision.',
          );
        }
        data[3 * i + channel] = toByte(Math.fround(255 * share));
      }
    }
    return { width, height, data };
  });
}

function roundHalfToEven(value: number): number {
  const floor = Math.floor(value);
  const fraction = value - floor;
  return fraction > 0.5 || (fraction === 0.5 && floor % 2 === 1) ? floor + 1 : floor;
}

/** A picture as a tensor [1, 3, height, width] in -1..1: `x / 127.5 - 1`, with the references' float32 rounding. */
export function tensorFromImage({ width, height, data }: RgbImage): FloatTensor {
  const levels = Float32Array.from({ length: 256 }, (_, level) => 2 * Math.fround(level / 255) - 1);
  const pixels = width * height;
  const values = new Float32Array(3 * pixels);
  for (let i = 0; i < pixels; i++) {
    for (let channel = 0; channel < 3; channel++) values[channel * pixels + i] = levels[data[3 * i + channel]!]!;
  }
  return floats([1, 3, height, width], values);
}

export interface MaskOptions {
  /**
   * `luminance`: white is repainted, black kept, by ITU-R BT.601 luma as Pillow and therefore diffusers computes it.
   * `alpha`: transparent is repainted, opaque kept, as ComfyUI's LoadImage reads a mask. Default `luminance`.
   */
  readonly channel?: 'luminance' | 'alpha';
}

/** Pillow's `convert('L')`: BT.601 weights in 16-bit fixed point. */
const LUMA_RED = 19595;
const LUMA_GREEN = 38470;
const LUMA_BLUE = 7471;

/** The mask a picture stands for, [1, 1, height, width]: 1 is repainted, 0 is kept. */
export function maskFromImage(image: RgbaImage, { channel = 'luminance' }: MaskOptions = {}): FloatTensor {
  const { width, height, data, alpha } = image;
  const mask = new Float32Array(width * height);
  for (let i = 0; i < mask.length; i++) {
    if (channel === 'alpha') {
      mask[i] = 1 - (alpha?.[i] ?? 255) / 255;
    } else {
      const luma = LUMA_RED * data[3 * i]! + LUMA_GREEN * data[3 * i + 1]! + LUMA_BLUE * data[3 * i + 2]!;
      mask[i] = ((luma + 0x8000) >> 16) / 255;
    }
  }
  return floats([1, 1, height, width], mask);
}

/**
 * A mask at the size of the latent, by bilinear interpolation between the nearest pixels (half-pixel centres, no
 * averaging over the rest): ComfyUI's `reshape_mask`, which its inpainting applies to every `noise_mask`. The result is
 * not thresholded. The mask may have any size; it is stretched over the picture.
 *
 * @param mask [batch, 1, any height, any width]
 * @param height of the latent, the picture's divided by 8
 * @param width of the latent
 * @returns [batch, 1, height, width]
 */
export function latentMask(mask: FloatTensor, height: number, width: number): FloatTensor {
  const [batch, fromHeight, fromWidth] = pictureShape(mask, 1);
  const rows = interpolation(fromHeight, height);
  const columns = interpolation(fromWidth, width);
  const values = new Float32Array(batch * height * width);
  let written = 0;
  for (let index = 0; index < batch; index++) {
    const at = (y: number, x: number) => mask.data[(index * fromHeight + y) * fromWidth + x]!;
    for (const row of rows) {
      for (const column of columns) {
        const before = at(row.before, column.before) * (1 - column.share) + at(row.before, column.after) * column.share;
        const after = at(row.after, column.before) * (1 - column.share) + at(row.after, column.after) * column.share;
        values[written++] = before * (1 - row.share) + after * row.share;
      }
    }
  }
  return floats([batch, 1, height, width], values);
}

/** For each position along an axis, the two positions it lies between and the share of the second. */
function interpolation(from: number, to: number): { before: number; after: number; share: number }[] {
  return Array.from({ length: to }, (_, i) => {
    const position = Math.max(((i + 0.5) * from) / to - 0.5, 0);
    const before = Math.min(Math.floor(position), from - 1);
    return { before, after: Math.min(before + 1, from - 1), share: position - before };
  });
}

/** A colour value over another, 0..255; `opacity` is 0 transparent to 255 opaque. */
export function blend(colour: number, background: number, opacity: number): number {
  return Math.round((colour * opacity + background * (255 - opacity)) / 255);
}

/** A picture at another size: each new pixel is the mean of the old ones it touches. Meant for making small views. */
export function shrinkImage(image: RgbImage, width: number, height: number): RgbImage {
  const data = new Uint8Array(3 * width * height);
  for (let y = 0; y < height; y++) {
    const [top, bottom] = covered(y, height, image.height);
    for (let x = 0; x < width; x++) {
      const [left, right] = covered(x, width, image.width);
      for (let channel = 0; channel < 3; channel++) {
        let sum = 0;
        for (let row = top; row < bottom; row++) {
          for (let column = left; column < right; column++)
            sum += image.data[3 * (row * image.width + column) + channel]!;
        }
        data[3 * (y * width + x) + channel] = Math.round(sum / ((bottom - top) * (right - left)));
      }
    }
  }
  return { width, height, data };
}

/** The range of old positions, end excluded, that new position `i` of `to` touches. */
function covered(i: number, to: number, from: number): [number, number] {
  return [Math.floor((i * from) / to), Math.ceil(((i + 1) * from) / to)];
}

/** SHA-256 of a picture's size and pixels in hexadecimal: the same for the same picture in any file format. */
export async function imageHash({ width, height, data }: RgbImage): Promise<string> {
  const bytes = new Uint8Array(8 + data.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, width);
  view.setUint32(4, height);
  bytes.set(data, 8);
  const digest = new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, '0')).join('');
}

/** Batch, height and width of a tensor of pictures; throws a `RangeError` when it isn't one with these channels. */
function pictureShape({ shape }: FloatTensor, channels: number): [number, number, number] {
  const [batch, , height, width] = shape;
  if (shape.length !== 4 || shape[1] !== channels) {
    throw new RangeError(`A tensor of shape [batch, ${channels}, height, width] is needed, not [${shape.join(', ')}].`);
  }
  return [batch!, height!, width!];
}
