// Queue prompts that fail in the real ComfyUI frontend, and report what it shows of each error.
// usage: node show_errors.mjs SERVER_URL SCREENSHOT_FOLDER CASES.json
// CASES.json: name -> { prompt: API-format workflow, text: what the user has to read,
// places: of "panel" and "dialog" }.
// Prints one JSON object: name -> place -> { text, found, visible, marked }.
import fs from 'node:fs'
import path from 'node:path'
import { loadPrompt, newPage, openFrontend, setSetting, startBrowser } from './frontend.mjs'

const [url, screenshots, file] = process.argv.slice(2)
const ERRORS_TAB = 'Comfy.RightSidePanel.ShowErrorsTab'

// What an element says, whether it has the text in one piece, and whether nothing hides any of it.
async function shown(page, selector, text) {
  return page.evaluate(
    ([place, wanted]) => {
      const element = document.querySelector(place)
      const inSight = (box, node) => {
        for (let around = node.parentElement; around; around = around.parentElement) {
          if (getComputedStyle(around).overflowY === 'visible') continue
          const view = around.getBoundingClientRect()
          if (box.top < view.top || box.bottom > view.bottom) return false
        }
        return box.top >= 0 && box.bottom <= innerHeight
      }
      const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT)
      let found = false
      let visible = false
      while (walker.nextNode() && !visible) {
        const start = walker.currentNode.data.indexOf(wanted)
        if (start < 0) continue
        found = true
        const range = document.createRange()
        range.setStart(walker.currentNode, start)
        range.setEnd(walker.currentNode, start + wanted.length)
        // a line break has a box without width
        const boxes = [...range.getClientRects()].filter((box) => box.width > 0)
        visible = boxes.length > 0 && boxes.every((box) => inSight(box, walker.currentNode))
      }
      const marked = app.graph.nodes.filter(
        (node) => node.has_errors || node.strokeStyles?.executionError?.call(node)
      )
      return { text: element.innerText.slice(0, 2000), found, visible, marked: marked.map((node) => node.type) }
    },
    [selector, text]
  )
}

const report = {}
const cases = JSON.parse(fs.readFileSync(file, 'utf8'))
for (const [name, { prompt, text, places }] of Object.entries(cases)) {
  report[name] = {}
  for (const kind of places) {
    // A browser of its own for each: the frontend opens the workflows of its last page again.
    const browser = await startBrowser()
    const page = await newPage(browser)
    await openFrontend(page, url)
    await setSetting(page, ERRORS_TAB, kind === 'panel')
    await loadPrompt(page, prompt, 'error')
    await page.getByTestId('queue-button').click()
    if (kind === 'panel') await page.getByTestId('error-overlay-see-errors').click({ timeout: 90000 })
    const selector = kind === 'panel' ? '[data-testid=properties-panel]' : '[role=dialog]'
    await page.waitForSelector(selector, { timeout: 90000 })
    // the panel unfolds
    await page.waitForTimeout(1000)
    // What a node says against an input is behind an icon.
    const details = page.locator(`${selector} button[aria-expanded=false]:has([class*="lucide--info"])`)
    if (await details.count()) await details.first().click()
    // The panel puts its report together from several requests; without the text it says so later.
    await page
      .waitForFunction(
        ([place, wanted]) => document.querySelector(place)?.textContent.includes(wanted),
        [selector, text],
        { timeout: 20000 }
      )
      .catch(() => {})
    await page.waitForTimeout(500)
    report[name][kind] = await shown(page, selector, text)
    await page.screenshot({ path: path.join(screenshots, `error_${name}_${kind}.png`) })
    await browser.close()
  }
}
console.log(JSON.stringify(report))
