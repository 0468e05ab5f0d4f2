/**
 * PNG files with text inside (PNG specification, third edition, W3C 2025; its section numbers stand beside the code).
 * Pixels are coded by fast-png; texts are read and written here, because fast-png knows only Latin-1 ones.
 */
import { decode, encode } from 'fast-png';
import { Unzlib } from 'fflate';
import { MmditxError } from '../errors.ts';
import { blend, type RgbaImage, type RgbImage } from './image.ts';

const SIGNATURE = Uint8Array.of(0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a);

/** Bytes of a chunk beside its data: length, type and CRC (5.3). */
const CHUNK_OVERHEAD = 12;
const HEADER_CHUNK_BYTES = CHUNK_OVERHEAD + 13;

/** 256 colours of three bytes (11.2.2). */
const MAX_PALETTE_BYTES = 768;

/** The longest keyword (11.3.3.1). */
const MAX_KEYWORD = 79;

/** Compressed texts of a file may become this long in all; more is taken for an attack. */
const MAX_INFLATED_TEXT = 2 ** 20;
/** What each counts for at least: inflating a few bytes takes some ten kilobytes, too. */
const LEAST_INFLATED_TEXT = 2 ** 10;

/** More than the largest picture that is read has when its pixels come in 8 KiB each, as libpng writes them. */
const MAX_CHUNKS = 2 ** 17;

/** Compressed bytes inflated at once: deflate grows data 1032-fold at most, so this bounds memory beyond a limit. */
const INFLATE_STEP = 8192;

/** Pictures with more pixels are refused unless the caller allows more: 8192 x 8192. */
const DEFAULT_MAX_PIXELS = 2 ** 26;
/** JPEG's limit. A picture of one column would take as much work for each pixel as others for each row. */
const MAX_SIDE = 65_535;

export interface EncodeOptions {
  /** Texts by keyword (1 to 79 printable Latin-1 characters), written in order before the pixels. */
  readonly text?: ReadonlyMap<string, string>;
}

/**
 * A picture as an 8-bit RGB PNG file. A text is written as `tEXt` if Latin-1 has all its characters and as `iTXt`
 * otherwise, as Pillow and therefore stable-diffusion-webui does. NUL, which no PNG text can hold, is left out.
 */
export function encodePng({ width, height, data }: RgbImage, { text = new Map() }: EncodeOptions = {}): Uint8Array {
  const png = encode({ width, height, data, depth: 8, channels: 3 }, { zlib: { level: 6 } });
  const pixelStart = SIGNATURE.length + HEADER_CHUNK_BYTES;
  const texts = Array.from(text, ([keyword, value]) => textChunk(keyword, value.replaceAll('\0', '')));
  return concatenate([png.subarray(0, pixelStart), ...texts, png.subarray(pixelStart)]);
}

export interface DecodeOptions {
  /** Larger pictures are refused; default 2^26. */
  readonly maxPixels?: number;
  /** The colour behind transparent pixels, red, green, blue 0..255; default white. */
  readonly background?: readonly [number, number, number];
}

/**
 * The pixels of any PNG file as 8-bit RGB over a background colour, with its alpha beside them. Colour profiles are not
 * applied. Memory stays within a small multiple of the pixels that the file's header announces.
 *
 * @throws MmditxError `bad-file` when the file is damaged or has more than `maxPixels`
 */
export function decodePng(
  bytes: Uint8Array,
  { maxPixels = DEFAULT_MAX_PIXELS, background = [255, 255, 255] }: DecodeOptions = {},
): RgbaImage {
  const chunks = listChunks(bytes);
  const header = readHeader(bytes, chunks[0]);
  if (header.width * header.height > maxPixels || Math.max(header.width, header.height) > MAX_SIDE) {
    throw badPng(
      `is ${header.width} x ${header.height} pixels, more than ${maxPixels} or ${MAX_SIDE} on a side; scale it down first`,
    );
  }
  // fast-png 8.0 does not separate packed samples of interlaced pictures.
  if (header.isInterlaced && header.bitsPerPixel < 8) {
    throw badPng('is interlaced with less than 8 bits per pixel, which is not read; save it without interlacing');
  }
  // fast-png inflates colour profiles of any size and stumbles over odd texts: it only gets what makes the picture.
  const wanted = header.isIndexed ? ['PLTE', 'tRNS', 'IDAT', 'IEND'] : ['tRNS', 'IDAT', 'IEND'];
  const picture = chunks.filter(({ type }, i) => i === 0 || wanted.includes(type));
  for (const chunk of picture) if (!isIntact(bytes, chunk)) throw damaged();
  checkPalette(picture);
  // In one piece, as each costs fast-png a copy of what was inflated last.
  const pixels = concatenate(picture.filter(({ type }) => type === 'IDAT').map((chunk) => dataOf(bytes, chunk)));
  const needed = rawSize(header);
  if (inflate(pixels, needed, false).size < needed) throw badPng('is cut short; get it again');

  const firstPixels = picture.find(({ type }) => type === 'IDAT');
  const parts = picture.flatMap((chunk) => {
    if (chunk === firstPixels) return makeChunk('IDAT', [pixels]);
    return chunk.type === 'IDAT' ? [] : bytes.subarray(chunk.start, chunk.end);
  });
  const decoded = attempt(() => decode(concatenate([SIGNATURE, ...parts])));
  if (header.isIndexed && !decoded.palette) throw badPng('has no palette');
  return toRgba(decoded, background);
}

/**
 * The texts of a PNG file by keyword, without decoding its pixels. Of texts with one keyword the last counts. Texts in
 * a file that is cut short are returned as far as they are complete.
 *
 * @throws MmditxError `bad-file` when this is no PNG file, a text is damaged, or the compressed texts are longer than
 *   1 MiB in all
 */
export function pngText(bytes: Uint8Array): Map<string, string> {
  const texts = new Map<string, string>();
  let budget = MAX_INFLATED_TEXT;
  for (const chunk of listChunks(bytes)) {
    if (!Object.hasOwn(textReaders, chunk.type)) continue;
    if (!isIntact(bytes, chunk)) throw badPng('has a damaged text; get it again');
    if (budget < 0) throw badPng('has more compressed texts than are read');
    const read = textReaders[chunk.type as keyof typeof textReaders];
    const { keyword, text, inflated } = read(dataOf(bytes, chunk), budget);
    if (inflated !== undefined) budget -= Math.max(inflated, LEAST_INFLATED_TEXT);
    texts.set(keyword, text);
  }
  return texts;
}

/** fast-png makes an object of each colour, and adds up the opacities of several lists. */
function checkPalette(chunks: readonly Chunk[]): void {
  for (const type of ['PLTE', 'tRNS']) {
    if (chunks.filter((chunk) => chunk.type === type).length > 1) throw badPng(`has more than one ${type} chunk`);
  }
  const palette = chunks.find(({ type }) => type === 'PLTE');
  if (palette && palette.end - palette.start > CHUNK_OVERHEAD + MAX_PALETTE_BYTES) {
    throw badPng('has a palette of more than 256 colours');
  }
}

interface Chunk {
  readonly type: string;
  /** Of its first byte, which belongs to its length. */
  readonly start: number;
  /** Of the byte behind its CRC. */
  readonly end: number;
}

/** The chunks of a file up to `IEND`, or up to the first that the file does not hold completely. */
function listChunks(bytes: Uint8Array): Chunk[] {
  if (!SIGNATURE.every((byte, i) => bytes[i] === byte)) {
    throw new MmditxError('bad-file', 'This is not a PNG file; give a picture that was saved as PNG.');
  }
  const view = viewOf(bytes);
  const chunks: Chunk[] = [];
  let start = SIGNATURE.length;
  while (start + CHUNK_OVERHEAD <= bytes.length) {
    const end = start + CHUNK_OVERHEAD + view.getUint32(start);
    if (end > bytes.length) break;
    const type = latin1(bytes.subarray(start + 4, start + 8));
    chunks.push({ type, start, end });
    if (chunks.length > MAX_CHUNKS) throw badPng(`has more than ${MAX_CHUNKS} chunks`);
    if (type === 'IEND') break;
    start = end;
  }
  return chunks;
}

function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

function dataOf(bytes: Uint8Array, { start, end }: Chunk): Uint8Array {
  return bytes.subarray(start + 8, end - 4);
}

/** Whether a chunk's type and data are what its CRC stands for. */
function isIntact(bytes: Uint8Array, { start, end }: Chunk): boolean {
  return crc32(bytes.subarray(start + 4, end - 4)) === viewOf(bytes).getUint32(end - 4);
}

interface ReadText {
  readonly keyword: string;
  readonly text: string;
  /** Bytes that came out of decompression, where there was any. */
  readonly inflated?: number;
}

/** Readers of the three kinds of text; `budget` is how many bytes may come out of decompression. */
const textReaders = {
  /** 11.3.3.2: keyword, NUL, Latin-1 text. */
  tEXt(data: Uint8Array): ReadText {
    const [keyword, text] = splitAtNul(data);
    return { keyword: latin1(keyword), text: latin1(text) };
  },
  /** 11.3.3.3: keyword, NUL, compression method 0, zlib stream of Latin-1 text. */
  zTXt(data: Uint8Array, budget: number): ReadText {
    const [keyword, rest] = splitAtNul(data);
    if (rest[0] !== 0) throw badPng('has a text of an unknown compression');
    const text = inflate(rest.subarray(1), budget, true);
    return { keyword: latin1(keyword), text: latin1(text.bytes), inflated: text.size };
  },
  /** 11.3.3.4: keyword, NUL, compressed or not, compression method, language, NUL, translated keyword, NUL, UTF-8 text. */
  iTXt(data: Uint8Array, budget: number): ReadText {
    const [keyword, rest] = splitAtNul(data);
    const [isCompressed, method] = rest;
    const [, afterLanguage] = splitAtNul(rest.subarray(2));
    const [, text] = splitAtNul(afterLanguage);
    if (isCompressed === 0) return { keyword: latin1(keyword), text: utf8(text) };
    if (isCompressed !== 1 || method !== 0) throw badPng('has a text of an unknown compression');
    const plain = inflate(text, budget, true);
    return { keyword: latin1(keyword), text: utf8(plain.bytes), inflated: plain.size };
  },
};

function textChunk(keyword: string, text: string): Uint8Array {
  if (!/^[\x20-\x7e\xa1-\xff]{1,79}$/.test(keyword)) {
    throw new RangeError(`"${keyword}" cannot be a PNG keyword: 1 to ${MAX_KEYWORD} printable Latin-1 characters.`);
  }
  const name = latin1Bytes(keyword);
  const isLatin1 = !/[^\0-\xff]/.test(text);
  return isLatin1
    ? makeChunk('tEXt', [name, Uint8Array.of(0), latin1Bytes(text)])
    : makeChunk('iTXt', [name, new Uint8Array(5), new TextEncoder().encode(text)]);
}

function makeChunk(type: string, parts: readonly Uint8Array[]): Uint8Array {
  const chunk = concatenate([new Uint8Array(4), latin1Bytes(type), ...parts, new Uint8Array(4)]);
  const view = new DataView(chunk.buffer);
  view.setUint32(0, chunk.length - CHUNK_OVERHEAD);
  view.setUint32(chunk.length - 4, crc32(chunk.subarray(4, -4)));
  return chunk;
}

/** CRC-32 with the polynomial of ISO 3309, as in gzip and Ethernet (annex D). */
const crcTable = Uint32Array.from({ length: 256 }, (_, byte) => {
  let crc = byte;
  for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ 0xedb88320 : crc >>> 1;
  return crc;
});

function crc32(bytes: Uint8Array): number {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = (crc >>> 8) ^ crcTable[(crc ^ byte) & 0xff]!;
  return (crc ^ 0xffffffff) >>> 0;
}

/**
 * Inflates a zlib stream.
 * @param keep whether the bytes are wanted, or only their number
 * @throws MmditxError `bad-file` as soon as more than `limit` bytes come out, or for a damaged stream
 */
function inflate(packed: Uint8Array, limit: number, keep: boolean): { bytes: Uint8Array; size: number } {
  const pieces: Uint8Array[] = [];
  let size = 0;
  const inflator = new Unzlib((piece) => {
    size += piece.length;
    if (keep) pieces.push(piece);
  });
  const push = (data: Uint8Array, isLast: boolean) => {
    attempt(() => inflator.push(data, isLast));
    if (size > limit) throw badPng(`holds more than the ${limit} bytes that are expected of it`);
  };
  for (let at = 0; at < packed.length; at += INFLATE_STEP) push(packed.subarray(at, at + INFLATE_STEP), false);
  push(new Uint8Array(0), true);
  return { bytes: concatenate(pieces), size };
}

interface Header {
  readonly width: number;
  readonly height: number;
  readonly bitsPerPixel: number;
  readonly isInterlaced: boolean;
  /** Whether pixels are numbers of palette entries. */
  readonly isIndexed: boolean;
}

const INDEXED = 3;

/** Samples per pixel and allowed bits per sample of each colour type (11.2.1). */
const colourTypes: Readonly<Record<number, { channels: number; depths: readonly number[] }>> = {
  0: { channels: 1, depths: [1, 2, 4, 8, 16] },
  2: { channels: 3, depths: [8, 16] },
  [INDEXED]: { channels: 1, depths: [1, 2, 4, 8] },
  4: { channels: 2, depths: [8, 16] },
  6: { channels: 4, depths: [8, 16] },
};

function readHeader(bytes: Uint8Array, chunk: Chunk | undefined): Header {
  if (chunk?.type !== 'IHDR' || chunk.end - chunk.start !== HEADER_CHUNK_BYTES) throw badPng('has no valid header');
  const data = dataOf(bytes, chunk);
  const [width, height] = [viewOf(data).getUint32(0), viewOf(data).getUint32(4)];
  const [depth, colourType, , , interlace] = data.subarray(8) as unknown as [number, number, number, number, number];
  const colour = colourTypes[colourType];
  if (width === 0 || height === 0 || !colour?.depths.includes(depth) || interlace > 1) {
    throw badPng('has no valid header');
  }
  return {
    width,
    height,
    bitsPerPixel: depth * colour.channels,
    isInterlaced: interlace === 1,
    isIndexed: colourType === INDEXED,
  };
}

/** Column, row, column step and row step of each pass of an interlaced picture, Adam7 (8.2). */
const interlacePasses = [
  [0, 0, 8, 8],
  [4, 0, 8, 8],
  [0, 4, 4, 8],
  [2, 0, 4, 4],
  [0, 2, 2, 4],
  [1, 0, 2, 2],
  [0, 1, 1, 2],
] as const;

/** Bytes of the filtered pixels: each row has a filter byte and is padded to whole bytes (7.2). */
function rawSize({ width, height, bitsPerPixel, isInterlaced }: Header): number {
  let size = 0;
  for (const [x, y, columnStep, rowStep] of isInterlaced ? interlacePasses : [[0, 0, 1, 1] as const]) {
    const columns = Math.ceil((width - x) / columnStep);
    const rows = Math.ceil((height - y) / rowStep);
    if (columns > 0 && rows > 0) size += rows * (1 + Math.ceil((columns * bitsPerPixel) / 8));
  }
  return size;
}

/** Any kind of decoded pixels as RGB over `background`. */
function toRgba(png: ReturnType<typeof decode>, background: readonly [number, number, number]): RgbaImage {
  const { width, height, depth, channels, palette, transparency } = png;
  const sample = sampleReader(png);
  const highest = 2 ** depth - 1;
  const scaled = (value: number) => Math.round((value * 255) / highest);
  const colour = [0, 0, 0];
  const data = new Uint8Array(3 * width * height);
  const alpha = new Uint8Array(width * height);
  let isOpaque = true;
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      let opacity = 255;
      if (palette) {
        const entry = palette[sample(x, y, 0)];
        if (!entry) throw badPng('uses a colour that its palette does not have');
        for (let i = 0; i < 3; i++) colour[i] = entry[i]!;
        opacity = entry[3] ?? 255;
      } else {
        const isGrey = channels < 3;
        // A single colour may be declared transparent (11.3.1.1); it is compared before scaling.
        const isTransparent = transparency?.length === channels && transparency.every((v, i) => sample(x, y, i) === v);
        if (isTransparent) opacity = 0;
        else if (channels % 2 === 0) opacity = scaled(sample(x, y, channels - 1));
        for (let i = 0; i < 3; i++) colour[i] = scaled(sample(x, y, isGrey ? 0 : i));
      }
      const pixel = y * width + x;
      alpha[pixel] = opacity;
      if (opacity < 255) isOpaque = false;
      for (let i = 0; i < 3; i++) data[3 * pixel + i] = blend(colour[i]!, background[i]!, opacity);
    }
  }
  return isOpaque ? { width, height, data } : { width, height, data, alpha };
}

/** Reads one sample of a decoded picture; samples of less than 8 bits are packed, the leftmost highest (7.2). */
function sampleReader({ width, depth, channels, data }: ReturnType<typeof decode>) {
  if (depth >= 8) return (x: number, y: number, channel: number) => data[(y * width + x) * channels + channel]!;
  const bytesPerRow = Math.ceil((width * depth) / 8);
  return (x: number, y: number) => {
    const bit = x * depth;
    return (data[y * bytesPerRow + (bit >> 3)]! >> (8 - depth - (bit & 7))) & (2 ** depth - 1);
  };
}

function splitAtNul(bytes: Uint8Array): [Uint8Array, Uint8Array] {
  const nul = bytes.indexOf(0);
  if (nul < 0) throw badPng('has a malformed text');
  return [bytes.subarray(0, nul), bytes.subarray(nul + 1)];
}

/** Latin-1 to text, exactly: the web's decoder of that name is windows-1252, which changes 0x80..0x9f. */
function latin1(bytes: Uint8Array): string {
  const step = 8192;
  let text = '';
  for (let at = 0; at < bytes.length; at += step) text += String.fromCharCode(...bytes.subarray(at, at + step));
  return text;
}

function latin1Bytes(text: string): Uint8Array {
  return Uint8Array.from(text, (character) => character.charCodeAt(0));
}

function utf8(bytes: Uint8Array): string {
  return new TextDecoder().decode(bytes);
}

function concatenate(parts: readonly Uint8Array[]): Uint8Array<ArrayBuffer> {
  const whole = new Uint8Array(parts.reduce((length, part) => length + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

/** Runs a decoder of someone else's making, whose errors mean that the file is damaged. */
function attempt<T>(decoder: () => T): T {
  try {
    return decoder();
  } catch (cause) {
    throw damaged(cause);
  }
}

function damaged(cause?: unknown): MmditxError {
  return new MmditxError('bad-file', 'This PNG file is damaged; get it again.', { cause });
}

function badPng(fault: string): MmditxError {
  return new MmditxError('bad-file', `This PNG file ${fault}.`);
}
