import { describe, expect, it } from 'vitest';
import { aspectBuckets, coverFit } from '../../src/training/buckets.ts';
import { type DatasetReportOptions, datasetReport, reportText } from '../../src/training/dataset-report.ts';

const picture = (name: string, width: number, height: number, ...captions: string[]) => ({
  name,
  width,
  height,
  captions,
});
const words = (count: number) => Array(count).fill('word').join(' ');
const count = (text: string) => text.split(' ').length + 2;
const buckets = aspectBuckets({ resolution: 512 });
const inBuckets: DatasetReportOptions = { fits: ({ width, height }) => [buckets.fit([width, height])] };
const report = (
  pictures: ReturnType<typeof picture>[],
  options: Partial<DatasetReportOptions> = {},
  broken: { name: string; reason: string }[] = [],
) => datasetReport({ pictures, broken }, { ...inBuckets, ...options });

describe('datasetReport', () => {
  it('counts pictures in each size, with what they lose and whether they are enlarged', () => {
    const { sizes } = report([
      picture('wide.png', 640, 480, 'a'), // 597 x 448 for 576 x 448
      picture('same.png', 576, 448, 'a'),
      picture('square.png', 256, 256, 'a'),
    ]);
    expect(sizes).toEqual([
      { size: [512, 512], pictures: 1, cropped: 0, enlarged: 1 },
      { size: [576, 448], pictures: 2, cropped: expect.closeTo(21 / 597 / 2, 10), enlarged: 0 },
    ]);
  });

  it('counts a picture in each size it is shown in, and names it once', () => {
    const both: DatasetReportOptions['fits'] = ({ width, height }) => [
      coverFit([width, height], [64, 64]),
      coverFit([width, height], [256, 256]),
    ];
    const { pictures, sizes, enlarged, cropped } = report([picture('a.png', 128, 64, 'a')], { fits: both });
    expect(pictures).toBe(1);
    expect(sizes.map(({ size, pictures }) => [...size, pictures])).toEqual([
      [64, 64, 1],
      [256, 256, 1],
    ]);
    expect(enlarged).toEqual({ count: 1, worst: [{ name: 'a.png', scale: 4, bucket: [256, 256] }] });
    expect(cropped).toEqual({ count: 1, worst: [{ name: 'a.png', cropped: 0.5, bucket: [64, 64] }] });
  });

  it('names the five worst of each kind, worst first', () => {
    const small = [100, 20, 300, 40, 50, 60, 70].map((side) => picture(`${side}.png`, side, side, 'a'));
    const { enlarged } = report(small);
    expect(enlarged.count).toBe(7);
    expect(enlarged.worst.map(({ name }) => name)).toEqual(['20.png', '40.png', '50.png', '60.png', '70.png']);
    expect(enlarged.worst[0]!.scale).toBeCloseTo(25.6, 10);
  });

  it('names pictures cropped by more than a share', () => {
    const wide = [picture('panorama.png', 9000, 1000, 'a'), picture('photo.png', 640, 480, 'a')];
    expect(report(wide).cropped.worst.map(({ name }) => name)).toEqual(['panorama.png']);
    expect(report(wide, { maxCropped: 0.03 }).cropped.worst.map(({ name }) => name)).toEqual([
      'panorama.png',
      'photo.png',
    ]);
    expect(report(wide, { maxCropped: 0.6 }).cropped.count).toBe(0);
  });

  it('counts tokens of each encoder, and captions that are cut', () => {
    const { captions, tokens, withoutCaption } = report(
      [
        picture('a.png', 512, 512, words(3), words(10), ''),
        picture('b.png', 512, 512, words(75), words(80)),
        picture('c.png', 512, 512, ''),
      ],
      {
        counters: [
          { name: 'CLIP', limit: 77, count },
          { name: 'T5', limit: 256, count },
        ],
      },
    );
    expect(captions).toBe(4);
    expect(tokens).toEqual([
      {
        encoder: 'CLIP',
        limit: 77,
        shortest: 5,
        median: 12,
        longest: 82,
        cut: { count: 1, worst: [{ name: 'b.png', tokens: 82, over: 5 }] },
      },
      { encoder: 'T5', limit: 256, shortest: 5, median: 12, longest: 82, cut: { count: 0, worst: [] } },
    ]);
    expect(withoutCaption).toEqual({ count: 1, worst: [{ name: 'c.png' }] });
  });

  it('counts texts as they are shown', () => {
    const texts: DatasetReportOptions['texts'] = ({ captions }) => captions.map((caption) => `photo of ${caption}`);
    const { tokens } = report([picture('a.png', 512, 512, 'x')], { texts, counters: [{ name: 'T', limit: 9, count }] });
    expect(tokens[0]!.longest).toBe(5);
  });

  it('says of nothing that there is nothing', () => {
    const empty = report([], { counters: [{ name: 'CLIP', limit: 77, count }] });
    expect(empty).toMatchObject({ pictures: 0, captions: 0, sizes: [], tokens: [] });
    expect(reportText(empty)).toBe('0 pictures, 0 captions');
  });
});

describe('reportText', () => {
  it('shows everything in aligned columns', () => {
    const pictures = [
      ...Array.from({ length: 120 }, (_, i) => picture(`${i}.jpg`, 3000, 4000, words(5))),
      picture('panorama.jpg', 9000, 1000, words(120)),
      picture('old.png', 100, 90, words(80)),
      picture('icon.webp', 32, 32, ''),
      picture('na\u001bme.png', 512, 512, ''),
    ];
    const broken = Array.from({ length: 7 }, (_, i) => ({ name: `clip${i}.jpg`, reason: 'is not a picture' }));
    const text = reportText(report(pictures, { counters: [{ name: 'CLIP', limit: 77, count }] }, broken));
    expect(text).toBe(`124 pictures, 122 captions

Size        Pictures   Share  Cropped  Enlarged
448 x 576        120  96.8 %    3.5 %         0
512 x 512          3   2.4 %    3.3 %         2
1024 x 256         1   0.8 %   55.6 %         0

Tokens  Shortest  Median  Longest  Limit  Cut
CLIP           7       7      122     77    2

Cut for CLIP, which takes 77 tokens: 2
  122 tokens  45 not seen  "panorama.jpg"
   82 tokens   5 not seen  "old.png"

Without caption: 2
  "icon.webp"
  "na\\u001bme.png"

Enlarged: 2
  16.0 times  512 x 512  "icon.webp"
   5.7 times  512 x 512  "old.png"

Cropped by more than 20 %: 1
  55.6 %  1024 x 256  "panorama.jpg"

Cannot be used: 7
  "clip0.jpg" is not a picture
  "clip1.jpg" is not a picture
  "clip2.jpg" is not a picture
  "clip3.jpg" is not a picture
  "clip4.jpg" is not a picture
  and 2 more`);
  });

  it('shows the commonest of very many sizes', () => {
    const own = aspectBuckets({ resolution: 1024, upscale: false, max: 2048 });
    const many = Array.from({ length: 60 }, (_, i) =>
      picture(`${i}.png`, 64 * (1 + (i % 15)), 64 * (1 + Math.floor(i / 15)), 'a'),
    );
    const common = Array.from({ length: 5 }, (_, i) => picture(`c${i}.png`, 960, 960, 'a'));
    const text = reportText(report([...many, ...common], { fits: ({ width, height }) => [own.fit([width, height])] }));
    expect(text).toContain('960 x 960         5');
    expect(text).toContain('and 21 more sizes with fewer pictures');
  });
});
